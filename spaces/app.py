"""A Hugging Face Space for the free CPU hardware: an image that follows a prompt and another image.

Run it on your machine with `pip install "nexus-adapters[embedded,app]"` and `python spaces/app.py`.
"""

from functools import cache

import gradio as gr
import torch
from PIL import Image, ImageDraw, ImageOps

from nexus_adapters import InvalidArgument, StableDiffusionNexusPipeline, extract, load_embedded

SIZE = (128, 128)  # what the embedded Stable Diffusion was trained on
CONDITIONS = ("canny", "sketch", "depth", "segmentation")
EXTRACTED = ("canny",)  # the others are taken as given: no extractor gives what the adapters know
VARIANTS = ("prime", "slim")
PROMPT = "an orange circle above a blue ring on a cyan background"
ABOUT = """# Nexus adapters
A Nexus adapter makes a frozen diffusion model follow a structure map, and it reads the prompt while it does.
This Space runs a small Stable Diffusion for colored shapes, 128x128 pixels, on a CPU. Try other colors in the
prompt (red, orange, yellow, green, cyan, blue, purple, pink), or an image of other shapes (circle, ring,
square, triangle, star, cross, heart, crescent).
"""


def example() -> Image.Image:
    """The image that is there at first: a circle above a ring."""
    picture = Image.new("RGB", SIZE, "navy")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((6, 8, 62, 64), fill="tomato")
    draw.ellipse((63, 58, 123, 118), outline="white", width=14)
    return picture


@cache
def pipeline(condition: str, variant: str) -> StableDiffusionNexusPipeline:
    """One for each adapter, loaded when it is first asked for."""
    return load_embedded(condition=condition, variant=variant)


def generate(
    prompt: str,
    image: Image.Image | None,
    condition: str,
    is_map: bool,
    variant: str,
    scale: float,
    seed: int,
) -> tuple[Image.Image, Image.Image]:
    """Return the image and the structure map that it follows. Bad input raises `gr.Error`."""
    if image is None:
        raise gr.Error("Add an image first.")
    fitted = ImageOps.fit(image.convert("RGB"), SIZE, method=Image.Resampling.LANCZOS)
    if not is_map and condition not in EXTRACTED:
        raise gr.Error(f"Upload a {condition} map, and check that the image is a structure map.")
    try:
        structure = fitted if is_map else extract(condition, fitted)
        generated = pipeline(condition, variant)(
            prompt,
            image=structure,
            policy="cond_only",
            adapter_conditioning_scale=scale,
            guidance_scale=2.0,
            num_inference_steps=20,
            generator=torch.Generator("cpu").manual_seed(int(seed)),
        )
    except InvalidArgument as error:
        raise gr.Error(str(error)) from error
    return generated.images[0], structure


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Nexus adapters") as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(PROMPT, label="Prompt")
                image = gr.Image(example(), type="pil", label="Image or structure map", height=256)
                condition = gr.Radio(list(CONDITIONS), value="canny", label="Kind of structure map")
                is_map = gr.Checkbox(False, label="The image is a structure map already")
                variant = gr.Radio(list(VARIANTS), value="prime", label="Adapter")
                scale = gr.Slider(0, 1.5, value=1.0, step=0.1, label="Strength of the adapter")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                button = gr.Button("Generate", variant="primary")
            with gr.Column():
                generated = gr.Image(label="Generated image", height=384)
                structure = gr.Image(label="Structure map", height=256)
        given = [prompt, image, condition, is_map, variant, scale, seed]
        gr.on([button.click, prompt.submit], generate, given, [generated, structure])
    return page


if __name__ == "__main__":
    build().launch()
