"""A small page with the kinds of inputs and functions that the real one has."""

import time
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from nexus_adapters.errors import InvalidArgument


def generate(state, prompt, picture, strength, seed, names):
    """Return an image that depends on all inputs, after `seed` hundredths of a second."""
    if strength > 1:
        raise InvalidArgument("strength", "at most 1", strength)
    if prompt == "fail":
        raise RuntimeError("secret in /srv/private/base/model.safetensors")
    time.sleep(0.01 * seed)
    size = (32, 32) if picture is None else Image.open(picture).size
    file = Path(get_upload_folder()) / f"image-{abs(hash((prompt, strength, seed)))}.png"
    Image.new("RGB", size, (len(prompt) % 256, seed % 256, int(strength * 255))).save(file)
    return [str(file)], {"prompt": prompt, "seed": seed, "names": names}


def refresh(canvas):
    return "nothing" if not canvas else str(sorted(canvas))


def build():
    with gr.Blocks(title="Stand-in") as page:
        state = gr.State({})
        prompt = gr.Textbox(label="Prompt")
        picture = gr.File(label="Picture", type="filepath", file_types=["image"])
        canvas = gr.HTML({"image": None, "edited": False}, label="Canvas")
        strength = gr.Slider(0, 2, 1, label="Strength")
        seed = gr.Number(0, precision=0, label="Seed")
        names = gr.CheckboxGroup(["Prime", "Slim"], value=["Prime"], label="Adapters")
        images = gr.File(label="Images", file_count="multiple")
        settings = gr.JSON(label="Settings")
        note = gr.Textbox(label="Note")
        given = [state, prompt, picture, strength, seed, names]
        gr.Button("Generate").click(generate, given, [images, settings], api_name="generate")
        gr.Button("Refresh").click(refresh, canvas, note, api_visibility="private", queue=False)
    return page
