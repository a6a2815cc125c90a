"""The denoising loss, for a UNet alone or one with an adapter's features added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from diffusers.training_utils import compute_snr
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nexus_adapters.injection.residuals import ARGUMENT

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


def denoising_loss(
    unet: nn.Module,
    scheduler: NoiseSchedule,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    prompt_embeds: Float[Tensor, "b n d"],
    residuals: list[Tensor] | None = None,
) -> Float[Tensor, ""]:
    """The mean of `denoising_losses`; `residuals` go to the down blocks, and the list stays as it is."""
    extra = {} if residuals is None else {ARGUMENT: list(residuals)}
    return denoising_losses(
        unet, scheduler, latents, noise, timesteps, prompt_embeds, lambda noisy: extra
    ).mean()


def denoising_losses(
    unet: nn.Module,
    scheduler: NoiseSchedule,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
    prompt_embeds: Float[Tensor, "b n d"],
    arguments: Callable[[Tensor], Mapping[str, Any]],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " b"]:
    """Each sample's mean squared error of the UNet's prediction in the scheduler's own parametrisation.

    `unet` is a `UNet2DConditionModel`, wrapped or not; `latents` are scaled to unit variance; `arguments`
    gives the UNet's further arguments for the noisy latents, (b, c, h, w). `dtype`: of the UNet, where it is
    another one than the latents'.

    Raises ValueError for a prediction type that is neither epsilon nor v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise ValueError(f"scheduler.prediction_type: expected epsilon or v_prediction; received {kind!r}")
    dtype = dtype or latents.dtype
    noisy = scheduler.add_noise(latents, noise, timesteps).to(dtype)
    text, further = prompt_embeds.to(dtype), arguments(noisy)
    prediction = unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False, **further)[0]
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def min_snr_weights(
    scheduler: NoiseSchedule, timesteps: Int[Tensor, " b"], gamma: float
) -> Float[Tensor, " b"]:
    """Min-SNR weights of samples' losses (arXiv 2303.09556, section 3.4); the signal-to-noise ratio is SNR.

    min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v_prediction: both weigh the clean
    latents' error by min(SNR, gamma). Pure noise, of SNR 0, weighs 1 and 0.
    """
    snr: Tensor = compute_snr(scheduler, timesteps)  # type: ignore[no-untyped-call]  # diffusers' own
    if scheduler.config.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)
