"""What one training step reads on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, on one device.

    Attributes:
        indices: of the samples in the data set.
        latents: scaled to unit variance.
        noise: standard normal.
        u: uniform in [0, 1), what timesteps are made of.
        condition: structure maps in [0, 1].
        has_condition: False where the features are dropped.
        prompt_embeds: of a caption each, or of the empty prompt where it is dropped.
        added: what else the base's denoiser reads: SDXL's `text_embeds` and `time_ids`; empty for SD 1.x.
    """

    indices: Int[Tensor, " b"]
    latents: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    u: Float[Tensor, " b"]
    condition: Float[Tensor, "b 3 y x"]
    has_condition: Bool[Tensor, " b"]
    prompt_embeds: Float[Tensor, "b n d"]
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "added"}
        return Batch(**moved, added={name: tensor.to(device) for name, tensor in self.added.items()})
