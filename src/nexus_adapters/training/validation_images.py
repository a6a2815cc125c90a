"""Validation images, generated with the stock pipeline and the adapter, as users will generate theirs."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from nexus_adapters.bases.families import base_of
from nexus_adapters.bases.loading import BaseSource, load_pipeline
from nexus_adapters.bases.tokens import truncation_unlogged
from nexus_adapters.conditions import EXTRACTORS, extract
from nexus_adapters.data.conditioned import ConditionedSource, options_for
from nexus_adapters.data.prepared_set import options_of
from nexus_adapters.files import replacing
from nexus_adapters.methods import GenerationSettings, Method
from nexus_adapters.progress import progress
from nexus_adapters.training.config import DataOptions, ValidationOptions
from nexus_adapters.training.precision import Precision

_FONT_SIZE = 10  # of the prompts on a sheet, pixels
_TEXT_HEIGHT = 70


@dataclass(frozen=True)
class ValidationInput:
    """The prompt and the structure map from which an image is generated."""

    prompt: str
    condition: Image.Image


def validation_inputs(
    samples: ConditionedSource, held_out: Sequence[int], options: ValidationOptions
) -> list[ValidationInput]:
    """Return the maps of the first held-out samples, with their captions or the recipe's prompts."""
    inputs = []
    for place, index in enumerate(held_out[: options.images]):
        sample = samples.fit(index)
        prompts = options.prompts or (sample.captions[0],)
        inputs.append(ValidationInput(prompts[place % len(prompts)], sample.condition))
    return inputs


def generate_validation_images(
    denoiser: nn.Module,
    source: BaseSource,
    method: Method,
    adapter: nn.Module,
    precision: Precision,
    inputs: Sequence[ValidationInput],
    options: ValidationOptions,
    seed: int,
) -> list[Image.Image]:
    """Generate one image per input. The noise is determined by the seed and the input's index.

    The other parts of the base are loaded from `source` and released afterwards.
    """
    device = next(adapter.parameters()).device
    base, _ = base_of(denoiser)
    parts = {base.denoiser_name: denoiser, "safety_checker": None}
    pipe = load_pipeline(source, precision.dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    generated = []
    with torch.no_grad(), precision.autocast() if method.keeps_float32 else nullcontext():
        for place, given in enumerate(progress(inputs, what="validating", unit="image", leave=False)):
            generating = method.generating(pipe, adapter, [given.condition], GenerationSettings())
            with generating as generate, truncation_unlogged(generate):
                output = generate(
                    prompt=given.prompt,
                    width=given.condition.width,
                    height=given.condition.height,
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    generator=torch.Generator().manual_seed(seed + place),
                )
            generated.append(output.images[0])
    del pipe
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return generated


def structure_score(data: DataOptions) -> Callable[[Image.Image, Image.Image], float] | None:
    """Return a function (condition, image) -> how well the image follows the condition, in [0, 1].

    It extracts a map from the image and compares it to the condition with `Extractor.agreement`. None if no
    extractor has the condition's name, if the extractor cannot compare maps, if it needs a model but the
    options name none (a run does not download models unasked), and for the exact maps of scenes, which no
    extractor reproduces.
    """
    if data.condition not in EXTRACTORS or (data.kind == "scenes" and data.condition != "canny"):
        return None
    extractor = EXTRACTORS[data.condition]
    agreement = extractor.agreement
    if agreement is None or (extractor.model and "model" not in data.extractor):
        return None
    prepared_with = options_of(data.path, data.condition) if data.kind == "prepared" else {}
    _, options = options_for(data.condition, prepared_with | data.extractor)

    return lambda condition, image: agreement(extract(data.condition, image, **options), condition)


def save_sheet(path: Path, inputs: Sequence[ValidationInput], images: Sequence[Image.Image]) -> Image.Image:
    """Write a sheet atomically, with a column per image: condition, image and prompt. Returns the sheet."""
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (width * len(images), 2 * height + _TEXT_HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_SIZE)
    for column, (given, image) in enumerate(zip(inputs, images, strict=True)):
        left = column * width
        sheet.paste(given.condition.resize(image.size, Image.Resampling.BOX), (left, 0))
        sheet.paste(image, (left, height))
        lines = textwrap.wrap(given.prompt, max(8, 2 * width // _FONT_SIZE))  # a letter is half as wide
        text = "\n".join(lines[: _TEXT_HEIGHT // (_FONT_SIZE + 3)])
        pen.multiline_text((left + 2, 2 * height + 2), text, "black", font, spacing=2)
    with replacing(path) as stream:
        sheet.save(stream, format="PNG")
    return sheet
