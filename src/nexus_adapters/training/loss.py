"""The denoising loss, for a UNet alone or one with an adapter's features added."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

TimestepSampling = Literal["uniform", "cubic"]


@runtime_checkable
class NoiseSchedule(Protocol):
    """What the loss needs of a diffusers scheduler; diffusers has no common class that declares it."""

    config: Any

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents with as much noise as at these timesteps."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction."""


def draw_timesteps(
    sampling: TimestepSampling, count: int, num_train_timesteps: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """Timesteps in [0, num_train_timesteps).

    `cubic` is t = (1 - u^3) * num_train_timesteps with u uniform (T2I-Adapter, arXiv 2302.08453, section
    3.4): more weight on the noisy steps, in which structure is decided.
    """
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    position = u if sampling == "uniform" else 1 - u**3
    return (position * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def denoising_loss(
    unet: nn.Module,
    scheduler: NoiseSchedule,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    prompt_embeds: Float[Tensor, "b n d"],
    residuals: list[Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of the UNet's prediction in the scheduler's own parametrisation.

    `unet` is a `UNet2DConditionModel`, wrapped or not; `latents` are scaled to unit variance; `residuals` go
    to the UNet's down blocks, as in generation, and the list stays as it is.

    Raises ValueError for a prediction type that is neither epsilon nor v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"scheduler.prediction_type: expected epsilon or v_prediction; received {kind!r}")
    noisy = scheduler.add_noise(latents, noise, timesteps)
    extra = {} if residuals is None else {"down_intrablock_additional_residuals": list(residuals)}
    prediction = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False, **extra)[0]
    return F.mse_loss(prediction.float(), target.float())
