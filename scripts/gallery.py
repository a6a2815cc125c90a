"""Draw the gallery of docs/gallery.md with the embedded model: a sheet for each thing that controls can do.

    python scripts/gallery.py [--out docs/gallery] [--only mask ...]

Offline, on a CPU in a minute or two, and the same on every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from nexus_adapters import Control, attach, extract, load_adapter, load_base
from nexus_adapters.bundled import guidance_for
from nexus_adapters.cli.demo_sheet import CELL, Row, Sheet, demo_scenes, draw_sheet
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import SIZE
from nexus_adapters.injection import balance

STEPS, SEED = 20, 0
LARGE, INK = 36, "#1a1a1a"  # the text of README's picture
MAIN_SCENE = 17  # a test scene of two objects, on which Prime succeeds
GUIDANCE_SCALE = guidance_for("embedded")
Cell = tuple[tuple[str, str], Image.Image]  # a column's title and subtitle, and what stands in it


class Studio:
    """The embedded base, its Prime, and scenes to draw; pipelines share the parts."""

    def __init__(self) -> None:
        self.pipe: Any = load_base()
        self.pipe.set_progress_bar_config(disable=True)
        self.prime: Any = load_adapter("prime")
        self.scenes: list[TestScene] = demo_scenes(MAIN_SCENE)
        self.other: TestScene = load_test_scenes(1, first_seed=3)[0]

    def draw(self, prompt: str, *controls: Control, pipe: Any = None, **options: Any) -> Image.Image:
        """One image under these controls, always from the same noise."""
        pipe = pipe or self.pipe
        given = {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "generator": torch.Generator().manual_seed(SEED),
        }
        if not controls:
            return pipe(prompt, **given | options).images[0]  # type: ignore[no-any-return]
        with attach(pipe, *controls):
            return pipe(prompt, **given | options).images[0]  # type: ignore[no-any-return]

    def sibling(self, kind: Any) -> Any:
        """Another pipeline of the same parts."""
        pipe = kind.from_pipe(self.pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def half(left: bool) -> Image.Image:
    """A mask that is white in one half and fades out over an eighth of the width."""
    ramp = torch.linspace(4.5, -3.5, SIZE).clamp(0, 1)
    pixels = (ramp if left else ramp.flip(0)) * 255
    return Image.fromarray(pixels.byte().expand(SIZE, SIZE).numpy())


def first_image(studio: Studio) -> tuple[str, list[Cell]]:
    """The first image of README and docs/get-started.md, with other prompts; no prompt for a headline."""
    picture = Image.new("RGB", (SIZE, SIZE), "navy")
    ImageDraw.Draw(picture).ellipse((6, 8, 62, 64), fill="tomato")
    ImageDraw.Draw(picture).ellipse((63, 58, 123, 118), outline="white", width=14)
    edges = extract("canny", picture)
    cells: list[Cell] = [(("Picture", ""), picture), (("Edges", ""), edges)]
    for circle, ring, background in (
        ("orange", "blue", "cyan"),
        ("yellow", "red", "purple"),
        ("pink", "cyan", "green"),
        ("yellow", "pink", "blue"),
    ):
        prompt = f"a {circle} circle above a {ring} ring on a {background} background"
        control = Control(studio.prime, edges, policy="cond_only")
        image = studio.draw(prompt.replace("a orange", "an orange"), control)
        cells.append(((f"{circle} circle,\n{ring} ring,\non {background}", ""), image))
    return "", cells


def scale_sweep(studio: Studio) -> tuple[str, list[Cell]]:
    """The factor of the features, from none to more than was trained with."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for scale in (0.0, 0.25, 0.5, 1.0, 1.5):
        cells.append(
            (
                ("Scale", f"{scale:g}"),
                studio.draw(scene.prompt, Control(studio.prime, scene.condition, scale)),
            )
        )
    return scene.prompt, cells


def window_sweep(studio: Studio) -> tuple[str, list[Cell]]:
    """The part of the schedule in which the control acts: its beginning decides where things stand."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for start, end in ((0, 0.1), (0, 0.3), (0, 1), (0.3, 1), (0.6, 1)):
        control = Control(studio.prime, scene.condition, start=start, end=end)
        cells.append((("Window", f"{start:g} to {end:g}"), studio.draw(scene.prompt, control)))
    return scene.prompt, cells


def fading_sweep(studio: Studio) -> tuple[str, list[Cell]]:
    """How fast the features fade with the noise: the faster, the more the last steps are the base's own."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for exponent in (0.0, 0.25, 0.5, 1.0, 2.0):
        control = Control(studio.prime, scene.condition, noise_exponent=exponent)
        cells.append((("Noise exponent", f"{exponent:g}"), studio.draw(scene.prompt, control)))
    return scene.prompt, cells


def fading_and_policy(studio: Studio) -> tuple[str, list[Cell]]:
    """Features that fade, features in the conditional branch alone, and both."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for exponent, policy in ((0.0, "positive"), (0.5, "positive"), (0.0, "cond_only"), (0.5, "cond_only")):
        control = Control(studio.prime, scene.condition, policy=policy, noise_exponent=exponent)
        cells.append(((policy, f"noise exponent {exponent:g}"), studio.draw(scene.prompt, control)))
    return scene.prompt, cells


def two_controls(studio: Studio) -> tuple[str, list[Cell]]:
    """Two maps of one scene, each with some of its objects: by themselves and added up."""
    scene = studio.scenes[0].scene
    parts = [replace(scene, objects=scene.objects[place::2]) for place in (0, 1)]
    maps = [extract("canny", Image.fromarray(render(part).image)) for part in parts]
    prompt = caption(scene)
    controls = [Control(studio.prime, each) for each in maps]
    return prompt, [
        (("First map", ""), maps[0]),
        (("Second map", ""), maps[1]),
        (("First", "alone"), studio.draw(prompt, controls[0])),
        (("Second", "alone"), studio.draw(prompt, controls[1])),
        (("Both", "added up"), studio.draw(prompt, *controls)),
    ]


def mask(studio: Studio) -> tuple[str, list[Cell]]:
    """A control where its mask is white; the rest is the base's own."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for name, left in (("left", True), ("right", False)):
        control = Control(studio.prime, scene.condition, mask=half(left))
        cells += [(("Mask", name), half(left)), (("Result", name), studio.draw(scene.prompt, control))]
    cells.append((("No mask", ""), studio.draw(scene.prompt, Control(studio.prime, scene.condition))))
    return scene.prompt, cells


def image_to_image(studio: Studio) -> tuple[str, list[Cell]]:
    """Other colors for a picture whose shapes stay: the map holds them however much is drawn anew."""
    pipe = studio.sibling(StableDiffusionImg2ImgPipeline)
    original, wanted = studio.scenes[0], studio.scenes[1]
    image = Image.fromarray(original.rendering.image)
    cells: list[Cell] = [(("Picture", "to change"), image)]
    for strength in (0.6, 0.8, 0.95):
        options = {"pipe": pipe, "image": image, "strength": strength}
        if strength == 0.95:
            cells.append((("Without", f"strength {strength:g}"), studio.draw(wanted.prompt, **options)))
        control = Control(studio.prime, original.condition)
        cells.append(
            (("With control", f"strength {strength:g}"), studio.draw(wanted.prompt, control, **options))
        )
    return wanted.prompt, cells


def inpainting(studio: Studio) -> tuple[str, list[Cell]]:
    """One object drawn anew, in another color, within its own edges.

    The stock inpainting pipeline takes latents of 4 channels, and the embedded ones have 12: here a callback
    puts what lies outside of the area back in every step.
    """
    scene = studio.scenes[0].scene
    target = scene.objects[0]
    wanted = replace(scene, objects=(replace(target, color="yellow"), *scene.objects[1:]))
    image, condition = Image.fromarray(render(scene).image), studio.scenes[0].condition
    area = Image.new("L", image.size)
    reach = target.radius * 1.15
    ImageDraw.Draw(area).rectangle(
        [(target.x - reach, target.y - reach), (target.x + reach, target.y + reach)], 255
    )
    prompt, keep = caption(wanted), {"callback_on_step_end": kept_outside(studio.pipe, image, area)}
    return prompt, [
        (("Picture", "to change"), image),
        (("Area", "to generate again"), area),
        (("Without", "inpainting alone"), studio.draw(prompt, **keep)),
        (
            ("With control", "in the map's edges"),
            studio.draw(prompt, Control(studio.prime, condition), **keep),
        ),
    ]


def kept_outside(pipe: Any, image: Image.Image, area: Image.Image) -> Callable[..., dict[str, Any]]:
    """A callback after which the latents outside of the area are the image's, at the next step's noise."""
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(image)
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    white = torch.from_numpy(np.array(area, dtype=np.float32) / 255)[None, None]
    inside = F.interpolate(white, size=latents.shape[-2:], mode="area")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED + 1))

    def callback(running: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        following = running.scheduler.timesteps[step + 1 : step + 2]
        outside = running.scheduler.add_noise(latents, noise, following) if len(following) else latents
        return {"latents": inside * given["latents"] + (1 - inside) * outside}

    return callback


def policies(studio: Studio) -> tuple[str, list[Cell]]:
    """Whose text the adapter reads for the branches of guidance."""
    scene = studio.scenes[0]
    cells: list[Cell] = [(("Map", "canny edges"), scene.condition)]
    for policy in ("positive", "per_branch", "cond_only"):
        control = Control(studio.prime, scene.condition, policy=policy)
        cells.append(((policy, ""), studio.draw(scene.prompt, control)))
    return scene.prompt, cells


def prompt_against_map(studio: Studio) -> tuple[str, list[Cell]]:
    """What wins where the prompt describes another scene than the map, by balance and scale."""
    scene, told = studio.scenes[0], studio.other.prompt
    cells: list[Cell] = [
        (("Map", "of another scene"), scene.condition),
        (("Base", "prompt alone"), studio.draw(told)),
    ]
    for name in ("prompt", "balanced", "control"):
        control = Control(studio.prime, scene.condition, **balance(name))
        cells.append(((name, "balance"), studio.draw(told, control)))
    return told, cells


SHEETS: dict[str, Callable[[Studio], tuple[str, list[Cell]]]] = {
    "ring": first_image,
    "scale": scale_sweep,
    "window": window_sweep,
    "fading": fading_sweep,
    "fading-and-policy": fading_and_policy,
    "two-controls": two_controls,
    "mask": mask,
    "image-to-image": image_to_image,
    "inpainting": inpainting,
    "policies": policies,
    "prompt-against-map": prompt_against_map,
}


def framed(image: Image.Image) -> Image.Image:
    """Grey pictures, the masks, with a line around them, since the sheet is white."""
    found = image.convert("RGB")
    if image.mode == "L":
        ImageDraw.Draw(found).rectangle((0, 0, found.width - 1, found.height - 1), outline="#d9d9d9")
    return found


def draw(prompt: str, cells: Sequence[Cell]) -> Image.Image:
    """One row of pictures under their titles."""
    row = Row(prompt, [framed(image) for _, image in cells], [""] * len(cells))
    footer = [
        f"nexus-adapters, embedded model, Prime. {STEPS} steps, guidance {GUIDANCE_SCALE:g}, seed {SEED}."
    ]
    return draw_sheet(Sheet([title for title, _ in cells], [[row]], footer))


def draw_large(cells: Sequence[Cell]) -> Image.Image:
    """The pictures with their titles below, in text that is readable in README, 680 pixels wide."""
    gap, lines_height = 20, 150
    sheet = Image.new("RGB", (len(cells) * (CELL + gap) + gap, gap + CELL + lines_height), "white")
    for index, ((title, _), image) in enumerate(cells):
        corner = (gap + index * (CELL + gap), gap)
        sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), corner)
        place = (corner[0], gap + CELL + 10)
        ImageDraw.Draw(sheet).multiline_text(place, title, INK, ImageFont.load_default(LARGE), spacing=8)
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheets and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "gallery")
    parser.add_argument("--only", nargs="+", choices=sorted(SHEETS), default=list(SHEETS))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    studio = Studio()
    for name in tqdm(args.only, unit="sheet"):
        prompt, cells = SHEETS[name](studio)
        sheet = draw(prompt, cells) if prompt else draw_large(cells)
        sheet.save(args.out / f"{name}.webp", quality=85, method=6)


if __name__ == "__main__":
    main()
