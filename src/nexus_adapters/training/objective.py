"""What a training step minimizes: the frozen base's denoising loss under a method."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods.method import FEATURES, Method
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.loss import denoising_losses, timesteps_at
from nexus_adapters.training.precision import Precision


@dataclass
class Objective:
    """The loss of a batch under a method, with the base frozen.

    Attributes:
        base: the frozen one.
        denoiser: what is called as its denoiser, compiled or not: for a fused method the network of both.
        places: where the denoiser takes features.
        method: of what is trained.
        module: what is trained, wrapped (DDP, compiled) or not.
        precision: what the forward passes compute in.
        loss: how timesteps are drawn and weighed.
        reads_instead: prompt embeddings, (1, n, d), that the adapter reads in place of every prompt's; None
            lets it read the prompts.
    """

    base: Base
    denoiser: nn.Module
    places: FeaturePlaces
    method: Method
    module: nn.Module
    precision: Precision
    loss: LossOptions
    reads_instead: Float[Tensor, "1 n d"] | None = None

    def of(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss at the timesteps that the batch draws."""
        timesteps = timesteps_at(batch.u, self.loss.timesteps, self.base.num_train_timesteps, self.loss.band)
        losses = self.at(batch, timesteps)
        if self.loss.min_snr_gamma:
            losses = losses * self.base.loss_weights(timesteps, self.loss.min_snr_gamma)
        return losses.mean()

    def at(self, batch: Batch, timesteps: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Each sample's loss at given timesteps."""
        read = batch
        if self.reads_instead is not None:
            read = replace(batch, prompt_embeds=self.reads_instead.expand(len(batch.prompt_embeds), -1, -1))

        def arguments(noisy: Tensor) -> dict[str, Any]:
            # For the adapter, whose weights are float32; the base computes in its own dtype.
            with self.precision.autocast():
                found = self.method.denoiser_arguments(self.module, read, noisy, timesteps, self.base)
            features = found.pop(FEATURES, None)
            added = {} if features is None else self.places.arguments(features)
            return self.base.added_arguments(batch.added) | found | added

        # A network that base and adapter share has weights of both precisions.
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
