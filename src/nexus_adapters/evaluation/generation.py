"""Generate images with any method, each in the pipeline that its users would use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.bases.families import base_of, check_finite
from nexus_adapters.bases.tokens import truncation_unlogged
from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.choices import STEPS
from nexus_adapters.embedded.held_out import TestScene
from nexus_adapters.methods import GenerationSettings, method_of
from nexus_adapters.progress import progress

Images = list[UInt8[np.ndarray, "h w 3"]]


@runtime_checkable
class Prompted(Protocol):
    """A prompt and a structure map from which an image is generated."""

    @property
    def prompt(self) -> str: ...

    @property
    def condition(self) -> Image.Image: ...


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling. A `guidance_scale` of 1 is no guidance."""

    steps: int = STEPS
    guidance_scale: float = BUNDLED[EMBEDDED].guidance_scale
    seed: int = 0
    batch_size: int = 50


def generate(
    base: Any,
    adapter: nn.Module | Any,
    scenes: Sequence[Prompted],
    sampling: Sampling,
    settings: GenerationSettings | None = None,
    show_progress: bool = True,
) -> Images:
    """Generate one image per scene from its prompt and condition. All methods start from the same noise.

    Args:
        base: a stock pipeline.
        adapter: an adapter of any registered method; None for the base alone.
        scenes: prompts and conditions.
        sampling: settings of the sampling.
        settings: settings of the control; its `adapter_prompts` have one entry per scene.
        show_progress: show a progress bar over the batches.
    """
    images: Images = []
    settings = settings or GenerationSettings()
    firsts = range(0, len(scenes), sampling.batch_size)
    for first in progress(firsts, what="generating", unit="batch", shown=show_progress):
        part = slice(first, first + sampling.batch_size)
        swapped = settings.adapter_prompts
        own = replace(settings, adapter_prompts=None if swapped is None else swapped[part])
        images += generate_batch(base, adapter, scenes[part], first, sampling, own)
    return images


def generate_batch(
    base: Any,
    adapter: nn.Module | Any,
    cases: Sequence[Prompted],
    first: int,
    sampling: Sampling,
    settings: GenerationSettings,
) -> Images:
    """Generate the images of cases whose conditions have the same size in a single batch.

    `first` is the index of the first one among all cases, which determines the noise. The other arguments are
    those of `generate`.

    Raises:
        InvalidArgument: named "images", for images that are not finite.
    """
    conditions = [case.condition for case in cases]
    known, denoiser = base_of(base)
    dtype = next(denoiser.parameters()).dtype
    shape = _latent_shape(known.latent_channels, known.pixels_per_latent, conditions[0])
    arguments: dict[str, Any] = {
        "prompt": [case.prompt for case in cases],
        "latents": initial_latents(len(cases), shape, sampling.seed, first).to(base.device, dtype),
        "height": conditions[0].height,
        "width": conditions[0].width,
        # The noise that some samplers (such as ancestral ones) add in every step has the same seeds.
        "generator": [row_generator(sampling.seed, first + row) for row in range(len(cases))],
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "output_type": "np",
    }
    base.set_progress_bar_config(disable=True)
    control: Any = nullcontext(base)
    if adapter is not None:
        control = method_of(adapter).generating(base, adapter, conditions, settings)
    with control as called, truncation_unlogged(called):
        output: Float[np.ndarray, "b h w 3"] = np.asarray(called(**arguments).images)
    check_finite(output)
    return list(np.rint(output * 255).astype(np.uint8))


def _latent_shape(channels: int, factor: int, condition: Image.Image) -> tuple[int, int, int]:
    return channels, condition.height // factor, condition.width // factor


def initial_latents(count: int, shape: Sequence[int], seed: int, first: int = 0) -> Float[Tensor, "b c h w"]:
    """Return standard normal noise for `count` rows starting at `first`.

    Each row depends only on (seed, row), so every method starts from the same noise.
    """
    rows = range(first, first + count)
    return torch.stack([torch.randn(tuple(shape), generator=row_generator(seed, row)) for row in rows])


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the generator for all randomness of one image."""
    return torch.Generator().manual_seed(seed * 1_000_003 + row)


def reconstruct(vae: Any, scenes: Sequence[TestScene], batch_size: int = 50) -> Images:
    """Return an `AutoencoderKL`'s reconstructions, whose structure no method can surpass."""
    images: Images = []
    for first in range(0, len(scenes), batch_size):
        images += decode(vae, encode(vae, scenes[first : first + batch_size]))
    return images


@torch.no_grad()
def encode(vae: Any, scenes: Sequence[TestScene]) -> Float[Tensor, "b c y x"]:
    """Return the scenes' most likely latents, unscaled."""
    originals = np.stack([scene.rendering.image for scene in scenes])
    pixels = torch.from_numpy(originals).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents: Tensor = vae.encode(pixels).latent_dist.mode()
    return latents


@torch.no_grad()
def decode(vae: Any, latents: Float[Tensor, "b c y x"]) -> Images:
    """Return the images of unscaled latents."""
    output = vae.decode(latents).sample
    return list(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
