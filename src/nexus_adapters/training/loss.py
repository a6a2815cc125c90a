"""The denoising loss, for a denoiser alone or one with an adapter's features added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nexus_adapters.bases.base import Base

TimestepSampling = Literal["uniform", "cubic"]


def draw_timesteps(
    sampling: TimestepSampling, count: int, num_train_timesteps: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Timesteps in [0, num_train_timesteps), as `timesteps_at` places them."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return timesteps_at(u, sampling, num_train_timesteps)


def timesteps_at(
    u: Float[Tensor, " b"],
    sampling: TimestepSampling,
    num_train_timesteps: int,
    band: tuple[float, float] = (0.0, 1.0),
) -> Int[Tensor, " b"]:
    """The timesteps of uniform numbers u in [0, 1).

    `cubic` is t = (1 - u^3) * num_train_timesteps (T2I-Adapter, arXiv 2302.08453, section 3.4): more weight
    on the noisy steps, in which structure is decided. `band`: fractions of the schedule; only timesteps
    between them are drawn.
    """
    low, high = band
    position = low + (high - low) * (u if sampling == "uniform" else 1 - u**3)
    return (position * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def denoising_losses(
    base: Base,
    denoiser: nn.Module,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    prompt_embeds: Float[Tensor, "b n d"],
    arguments: Callable[[Tensor], Mapping[str, Any]] = lambda noisy: {},
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " b"]:
    """Each sample's mean squared error of the denoiser's prediction, in the base's own parametrization.

    Args:
        base: says how noise is added and what is predicted.
        denoiser: its denoiser, wrapped or not.
        latents: scaled to unit variance.
        noise: standard normal.
        timesteps: as the base counts them.
        prompt_embeds: one prompt's for each sample.
        arguments: gives the denoiser's further arguments for the noisy latents, (b, c, h, w).
        dtype: of the denoiser, where it is another one than the latents'.
    """
    noisy, target = base.noised(latents, noise, timesteps)
    dtype = dtype or latents.dtype
    noisy, text = noisy.to(dtype), prompt_embeds.to(dtype)
    prediction = base.predict(denoiser, noisy, timesteps, text, arguments(noisy))
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
