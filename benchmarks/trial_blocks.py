"""Blocks of about the same size as the paper's for `blocks.py`: other ways to read the prompt at a level.

To use one in a recipe, set `imports = ["trial_blocks"]` and `adapter.block = "gate"`, with this folder on
Python's path. All of them have a residual connection around the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.adapter.blocks import register_block
from nexus_adapters.adapter.stage import Stage, TextCrossAttention
from nexus_adapters.errors import expect


class TrialStage(Stage):
    """A stage whose `refine` is what `Stage` does between widening and the feature."""

    def __init__(self, **stage: Any) -> None:
        super().__init__(**stage)
        expect(self.residual, "residual", "True for the trial blocks", self.residual)

    def forward(
        self, x: Float[Tensor, "b c_in h_in w_in"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Return the feature, as `Stage` does."""
        return self.refine(self.widen(x), prompt_embeds).contiguous()

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Convolve, then attend to the prompt."""
        return self.read(self.resnets(x), prompt_embeds)

    def read(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Return the input plus the weighted attention."""
        pixels = x.flatten(2).transpose(1, 2).contiguous()
        normed = self.norm1(pixels)
        summed: Tensor = pixels + self.weigh(self.cross_attention(normed, prompt_embeds), normed)
        found: Tensor = summed.transpose(1, 2).unflatten(2, x.shape[2:])
        return found

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """Return the weighted attention."""
        return attended


@register_block("gate")
class Gate(TrialStage):
    """`2 sigmoid(W normed + b)` times the attention, per pixel and channel; 1 at the start."""

    def __init__(self, *, channels: int, **stage: Any) -> None:
        super().__init__(channels=channels, **stage)
        self.gate = nn.Linear(channels, channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """Weight the attention per pixel and channel."""
        return 2 * torch.sigmoid(self.gate(normed)) * attended


@register_block("gate-level")
class GateLevel(TrialStage):
    """One weight per level times the attention; 1 at the start."""

    def __init__(self, **stage: Any) -> None:
        super().__init__(**stage)
        self.gate = nn.Parameter(torch.ones(1))

    def weigh(self, attended: Float[Tensor, "b p c"], normed: Float[Tensor, "b p c"]) -> Tensor:
        """Weight the attention by one number."""
        return self.gate * attended


@register_block("first")
class First(TrialStage):
    """Attention before the two residual units, which then see its result."""

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Attend to the prompt, then convolve."""
        refined: Tensor = self.resnets(self.read(x, prompt_embeds))
        return refined


@register_block("film")
class Film(TrialStage):
    """No attention: the mean of the prompt scales and shifts the channels between the two residual units."""

    def __init__(self, *, channels: int, text_width: int, **stage: Any) -> None:
        super().__init__(channels=channels, text_width=text_width, **stage)
        del self.cross_attention, self.norm1
        self.film = nn.Linear(text_width, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def refine(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Scale and shift the channels between the two residual units."""
        scale, shift = self.film(prompt_embeds.mean(dim=1))[..., None, None].chunk(2, dim=1)
        refined: Tensor = self.resnets[1](self.resnets[0](x) * (1 + scale) + shift)
        return refined


@register_block("twice")
class Twice(TrialStage):
    """A second attention after that of the coarsest level, whose queries depend on the first."""

    def __init__(
        self,
        *,
        channels: int,
        text_width: int,
        heads: int,
        head_width: int,
        level: int,
        levels: int,
        **stage: Any,
    ) -> None:
        stage |= {"channels": channels, "text_width": text_width, "heads": heads, "head_width": head_width}
        super().__init__(**stage)
        self.norm2: nn.Module | None = None
        if level == levels - 1:
            # Built again to reproduce the random numbers of the published trainings, which replaced a whole
            # stage.
            super().__init__(**stage)
            self.norm2 = nn.LayerNorm(channels, eps=1e-5)
            self.cross_attention2 = TextCrossAttention(channels, text_width, heads, head_width)

    def read(
        self, x: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        """Attend once, and twice at the coarsest level."""
        once = super().read(x, prompt_embeds)
        if self.norm2 is None:
            return once
        pixels = once.flatten(2).transpose(1, 2)
        again: Tensor = pixels + self.cross_attention2(self.norm2(pixels), prompt_embeds)
        found: Tensor = again.transpose(1, 2).unflatten(2, x.shape[2:])
        return found
