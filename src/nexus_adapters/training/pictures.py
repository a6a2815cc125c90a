"""Pictures during a run: drawn by the stock pipeline with the adapter attached, as users will draw them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from PIL import Image
from torch import nn

from nexus_adapters.conditions import EXTRACTORS, extract
from nexus_adapters.data.encoders import without_checker
from nexus_adapters.data.fitting import Fitting
from nexus_adapters.data.prepared_set import options_of
from nexus_adapters.embedded import no_loading_bars
from nexus_adapters.injection import Control, attach
from nexus_adapters.metrics.edges import edge_f1
from nexus_adapters.training.base import base_folder, source
from nexus_adapters.training.config import DataOptions, TrainConfig, ValidationOptions
from nexus_adapters.training.controlnet_xs import controlled_by_xs
from nexus_adapters.training.precision import Precision
from nexus_adapters.training.validation import Picture


def draw_pictures(
    config: TrainConfig,
    unet: nn.Module,
    adapter: nn.Module,
    precision: Precision,
    pictures: Sequence[Picture],
) -> list[Image.Image]:
    """One picture each, from noise that follows from the seed and the picture's place.

    The base's other parts are loaded for this and let go again.
    """
    options, device = config.validation, next(adapter.parameters()).device
    with no_loading_bars():
        kind: Any = DiffusionPipeline
        pipe = kind.from_pretrained(
            base_folder(config.base),
            unet=unet,
            **without_checker(base_folder(config.base), source(config.base)),
            torch_dtype=precision.dtype,
            **source(config.base),
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    drawn = []
    # These keep float32 weights and are handed the base's dtype; others convert what comes and goes.
    is_mixed = isinstance(adapter, ControlNetModel | ControlNetXSAdapter)
    with torch.no_grad(), precision.autocast() if is_mixed else nullcontext():
        for place, picture in enumerate(pictures):
            with _controlled(pipe, adapter, picture.condition) as draw:
                output = draw(
                    picture.prompt,
                    width=picture.condition.width,
                    height=picture.condition.height,
                    num_inference_steps=options.num_inference_steps,
                    guidance_scale=options.guidance_scale,
                    generator=torch.Generator().manual_seed(config.seed + place),
                )
            drawn.append(output.images[0])
    del pipe
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return drawn


@contextmanager
def _controlled(pipe: Any, adapter: nn.Module, condition: Image.Image) -> Iterator[Callable[..., Any]]:
    """The pipeline's call, under the adapter."""
    if isinstance(adapter, ControlNetModel):
        from diffusers import AutoPipelineForText2Image  # slow: it brings all pipelines

        kind: Any = AutoPipelineForText2Image
        controlled = kind.from_pipe(pipe, controlnet=adapter)
        controlled.set_progress_bar_config(disable=True)
        yield partial(controlled, image=condition)
        return
    is_xs = isinstance(adapter, ControlNetXSAdapter)
    control = Control(adapter, condition) if not is_xs else None
    with controlled_by_xs(pipe, adapter, condition) if control is None else attach(pipe, control):
        yield pipe


def held_out_pictures(fitting: Fitting, held_out: Sequence[int], options: ValidationOptions) -> list[Picture]:
    """What to draw: the first held-out samples' maps, with their first captions or the recipe's prompts."""
    pictures = []
    for place, index in enumerate(held_out[: options.images]):
        sample = fitting.fit(index)
        prompts = options.prompts or (sample.captions[0],)
        pictures.append(Picture(prompts[place % len(prompts)], sample.condition))
    return pictures


def structure_score(data: DataOptions) -> Callable[[Image.Image, Image.Image], float] | None:
    """(condition, picture) -> how well the picture's own map agrees with the condition, in [0, 1].

    The map is drawn from the picture by the condition's extractor. Maps of lines: F1 of their pixels at 1
    pixel tolerance; others: 1 less the mean absolute difference. None where no extractor has that name, where
    it needs a model and the options name none (a run fetches no model that nobody asked for), and for the
    exact maps of scenes, which no extractor would draw again.
    """
    if data.condition not in EXTRACTORS or (data.kind == "scenes" and data.condition != "canny"):
        return None
    extractor = EXTRACTORS[data.condition]
    if extractor.model and "model" not in data.extractor:
        return None
    drawn_by = options_of(data.path, data.condition) if data.kind == "prepared" else {}
    options = drawn_by | data.extractor

    def score(condition: Image.Image, picture: Image.Image) -> float:
        wanted = np.asarray(condition.convert("L"))
        found = np.asarray(extract(data.condition, picture, **options).convert("L"))
        if extractor.lines:
            return float(edge_f1(found > 127, wanted > 127))
        return 1.0 - float(np.abs(found.astype(float) - wanted).mean()) / 255

    return score
