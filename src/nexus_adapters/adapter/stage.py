"""The paper's network: convolutional stages, each ending in cross-attention to the prompt (arXiv 2602.14514).

Attribute names match the public release's state dict (`in_conv`, `resnets`, `block1.gwc`, `norm1`,
`cross_attention.to_out.0`, ...), so weights load and save under the same names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.adapter.blocks import LEVEL_ARGUMENTS, constructor_keywords, register_block


class HeterogeneousConv(nn.Module):
    """Slim's convolution: a grouped 3x3 and a dense 1x1 over the same input, summed (arXiv 2602.14514).

    The grouped convolution sees the neighborhood, the 1x1 convolution mixes the groups.
    (B, C, H, W) -> (B, C, H, W); `channels` must be divisible by `groups`.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.gwc = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=groups, bias=False)
        self.pwc = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        out: Tensor = self.gwc(x) + self.pwc(x)
        return out


class ResidualUnit(nn.Module):
    """`x + Conv1x1(ReLU(K(x)))`, with K a plain 3x3 (`groups=1`) or a `HeterogeneousConv` (`groups>=2`)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block1: nn.Module
        if groups == 1:
            self.block1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        else:
            self.block1 = HeterogeneousConv(channels, groups)
        self.block2 = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        out: Tensor = x + self.block2(F.relu(self.block1(x)))
        return out


class TextCrossAttention(nn.Module):
    """Multi-head attention from pixels to prompt tokens; softmax scale 1/sqrt(head_width).

    (B, H*W, C) and (B, N, text_width) -> (B, H*W, C). Queries come from the pixels, keys and values from
    the text, both without bias; the output projection back to C has one.
    """

    def __init__(self, channels: int, text_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner_width = heads * head_width
        self.to_q = nn.Linear(channels, inner_width, bias=False)
        self.to_k = nn.Linear(text_width, inner_width, bias=False)
        self.to_v = nn.Linear(text_width, inner_width, bias=False)
        # A list with one element, because the release names this layer `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(inner_width, channels)])

    def forward(
        self, pixels: Float[Tensor, "b p c"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b p c"]:
        query, key, value = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.to_q(pixels), self.to_k(prompt_embeds), self.to_v(prompt_embeds))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return out


@register_block("paper")
class Stage(nn.Module):
    """One level of the adapter: pool, widen, two residual units, LayerNorm, cross-attention.

    (B, in_channels, H, W) and (B, N, text_width) -> (B, channels, H', W'), where each of `pools` poolings
    halves H and W, rounding up. The output is this level's feature and the next stage's input.

    As in the paper and its release, the result is the attention's output alone. `residual=True` adds the
    input of the LayerNorm to it; with `zero_init=True`, the attention then starts out as zero.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        pools: int,
        groups: int,
        text_width: int,
        heads: int,
        head_width: int,
        residual: bool,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.pools = pools
        self.residual = residual
        self.in_conv = nn.Conv2d(in_channels, channels, kernel_size=1) if in_channels != channels else None
        self.resnets = nn.Sequential(ResidualUnit(channels, groups), ResidualUnit(channels, groups))
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.cross_attention = TextCrossAttention(channels, text_width, heads, head_width)
        if zero_init:
            for parameter in self.cross_attention.to_out.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "b c_in h_in w_in"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b c h w"]:
        x = self.resnets(self.widen(x))
        # Copied once to pixel-major order, for the norm, the queries and the output projection.
        pixels = x.flatten(2).transpose(1, 2).contiguous()
        attended = self.cross_attention(self.norm1(pixels), prompt_embeds)
        if self.residual:
            attended = attended + pixels
        # Contiguous: the UNet adds it to its own activations at every step.
        feature: Tensor = attended.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()
        return feature

    def widen(self, x: Float[Tensor, "b c_in h_in w_in"]) -> Float[Tensor, "b c h w"]:
        """Return the previous level's output in this level's size and width."""
        for _ in range(self.pools):
            x = F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
        return x if self.in_conv is None else self.in_conv(x)


class Trunk(nn.Module):
    """Stem and stages. Each stage's output is a feature, and the next stage's input.

    `block` is the class of every stage (see `register_block`), `stage` are its arguments and options.
    """

    # Set by ModelMixin.enable_gradient_checkpointing on modules that have the first attribute.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        pools: Sequence[int],
        unshuffle: int,
        block: type[nn.Module] = Stage,
        **stage: Any,
    ) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(unshuffle)
        self.conv_in = nn.Conv2d(in_channels * unshuffle**2, channels[0], kernel_size=3, padding=1)
        inputs = (channels[0], *channels)
        accepted = constructor_keywords(block)
        self.body = nn.ModuleList()
        for level, (before, width, pool) in enumerate(zip(inputs, channels, pools, strict=False)):
            place = {"level": level, "levels": len(channels)}
            place = {name: place[name] for name in LEVEL_ARGUMENTS if name in accepted}
            self.body.append(block(in_channels=before, channels=width, pools=int(pool), **place, **stage))

    def forward(
        self, condition: Float[Tensor, "b c h w"], prompt_embeds: Float[Tensor, "b n d"]
    ) -> list[Tensor]:
        x = self.conv_in(self.unshuffle(condition))
        features = []
        for stage in self.body:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                assert self._gradient_checkpointing_func is not None
                x = self._gradient_checkpointing_func(stage, x, prompt_embeds)
            else:
                x = stage(x, prompt_embeds)
            features.append(x)
        return features
