"""What a training step minimises: the frozen base's denoising loss under a method."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus_adapters.data.batch import Batch
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.loss import NoiseSchedule, denoising_losses, min_snr_weights, timesteps_at
from nexus_adapters.training.methods import ControlNetXSMethod, Method
from nexus_adapters.training.precision import Precision


@dataclass
class Objective:
    """The loss of a batch under a method, with the base frozen.

    Attributes:
        unet: frozen, compiled or not.
        scheduler: the noise schedule.
        method: what is trained.
        precision: what the forward passes compute in.
        loss: how timesteps are drawn and weighed.
    """

    unet: nn.Module
    scheduler: NoiseSchedule
    method: Method
    precision: Precision
    loss: LossOptions

    def of(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss at the timesteps that the batch draws."""
        count = self.scheduler.config.num_train_timesteps
        timesteps = timesteps_at(batch.u, self.loss.timesteps, count, self.loss.band)
        losses = self.at(batch, timesteps)
        if self.loss.min_snr_gamma:
            losses = losses * min_snr_weights(self.scheduler, timesteps, self.loss.min_snr_gamma)
        return losses.mean()

    def at(self, batch: Batch, timesteps: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Each sample's loss at given timesteps."""

        def arguments(noisy: Tensor) -> dict[str, Any]:
            # For the adapter, whose weights are float32; the base computes in its own dtype.
            with self.precision.autocast():
                added = self.method.unet_arguments(batch, noisy, timesteps, batch.prompt_embeds)
            return batch.unet_arguments | added

        # A network that base and adapter share has weights of both precisions.
        is_fused = isinstance(self.method, ControlNetXSMethod)
        with self.precision.autocast() if is_fused else nullcontext():
            return denoising_losses(
                self.unet,
                self.scheduler,
                batch.latents,
                batch.noise,
                timesteps,
                batch.prompt_embeds,
                arguments,
                self.precision.dtype,
            )
