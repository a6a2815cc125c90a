"""A small page with the kinds of inputs and functions that the real one has."""

import threading
import time

import gradio as gr
from PIL import Image, ImageOps

from nexus_adapters.errors import InvalidArgument

running = threading.Semaphore(0)


def generate(prompt, picture, strength, seed):
    if strength > 1:
        raise InvalidArgument("strength", "at most 1", strength)
    if prompt == "fail":
        raise RuntimeError("secret in /srv/private/base/model.safetensors")
    for _ in range(int(seed)):
        time.sleep(0.02)
    size = (32, 32) if picture is None else picture.size
    colour = (len(prompt) % 256, int(seed) % 256, int(strength * 255))
    return Image.new("RGB", size, colour), {"prompt": prompt, "seed": seed}


def flatten(drawing):
    return (
        None
        if drawing is None or drawing["composite"] is None
        else ImageOps.invert(drawing["composite"].convert("RGB"))
    )


def build():
    with gr.Blocks(title="Stand-in") as page:
        prompt = gr.Textbox(label="Prompt")
        picture = gr.Image(type="pil", label="Picture")
        canvas = gr.ImageEditor(type="pil", label="Canvas")
        strength = gr.Slider(0, 2, 1, label="Strength")
        seed = gr.Number(0, precision=0, label="Seed")
        button = gr.Button("Generate")
        image = gr.Image(label="Image", format="png")
        settings = gr.JSON(label="Settings")
        inverse = gr.Image(label="Inverse", format="png")
        given = [prompt, picture, strength, seed]
        button.click(generate, given, [image, settings], api_name="generate")
        canvas.change(flatten, canvas, inverse, api_visibility="private", queue=False)
    return page
