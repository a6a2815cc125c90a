"""The denoising loss, and `Objective`: the loss of a batch that a training step minimizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods.method import FEATURES, Method
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.precision import Precision


def timesteps_at(
    u: Float[Tensor, " b"],
    sampling: Literal["uniform", "cubic"],
    num_train_timesteps: int,
    band: tuple[float, float] = (0.0, 1.0),
) -> Int[Tensor, " b"]:
    """Return timesteps in [0, num_train_timesteps) for uniform random numbers u in [0, 1).

    "cubic" is t = (1 - u^3) * num_train_timesteps (T2I-Adapter, arXiv 2302.08453, section 3.4), which puts
    more weight on the noisy steps that determine structure. All timesteps lie between the two fractions of
    the schedule in `band`.
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
    """Return each sample's mean squared error of the denoiser's prediction, in the base's parametrization.

    Args:
        base: defines how noise is added and what is predicted.
        denoiser: the base's denoiser, wrapped or not.
        latents: latents, scaled to unit variance.
        noise: standard normal noise.
        timesteps: timesteps of the base's noise schedule.
        prompt_embeds: one prompt per sample.
        arguments: noisy latents, (b, c, h, w) -> additional arguments of the denoiser.
        dtype: the denoiser's dtype; None for that of the latents.
    """
    noisy, target = base.noised(latents, noise, timesteps)
    dtype = dtype or latents.dtype
    noisy, text = noisy.to(dtype), prompt_embeds.to(dtype)
    prediction = base.predict(denoiser, noisy, timesteps, text, arguments(noisy))
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


@dataclass
class Objective:
    """The loss of a batch when an adapter is trained on a frozen base.

    Attributes:
        base: the frozen base.
        denoiser: the base's denoiser, compiled or not; for a fused method, the network of denoiser and
            adapter.
        places: where features are added to the denoiser.
        method: the adapter's method.
        module: the network that is trained, wrapped (DDP, compiled) or not.
        precision: the precision of the forward passes.
        loss: how timesteps are sampled and weighted.
        adapter_prompt: embeddings, (1, n, d), that the adapter reads instead of the prompts; None to read the
            prompts.
    """

    base: Base
    denoiser: nn.Module
    places: FeaturePlaces
    method: Method
    module: nn.Module
    precision: Precision
    loss: LossOptions
    adapter_prompt: Float[Tensor, "1 n d"] | None = None

    def of(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the mean loss of a batch at the timesteps given by its random numbers."""
        timesteps = timesteps_at(batch.u, self.loss.timesteps, self.base.num_train_timesteps, self.loss.band)
        losses = self.at(batch, timesteps)
        if self.loss.min_snr_gamma:
            losses = losses * self.base.loss_weights(timesteps, self.loss.min_snr_gamma)
        return losses.mean()

    def at(self, batch: Batch, timesteps: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return each sample's loss at the given timesteps."""
        read = batch
        if self.adapter_prompt is not None:
            read = replace(batch, prompt_embeds=self.adapter_prompt.expand(len(batch.prompt_embeds), -1, -1))

        def arguments(noisy: Tensor) -> dict[str, Any]:
            # For the adapter, whose weights are float32; the base computes in its own dtype.
            with self.precision.autocast():
                found = self.method.denoiser_arguments(self.module, read, noisy, timesteps, self.base)
            features = found.pop(FEATURES, None)
            added = {} if features is None else self.places.arguments(features)
            return self.base.added_arguments(batch.added) | found | added

        # A network shared by base and adapter has weights in both precisions.
        with self.precision.autocast() if self.method.is_fused else nullcontext():
            return denoising_losses(
                self.base,
                self.denoiser,
                batch.latents,
                batch.noise,
                timesteps,
                batch.prompt_embeds,
                arguments,
                self.precision.dtype,
            )
