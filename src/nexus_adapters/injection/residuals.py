"""From an adapter's features to those of a batch. Pure: the hook and the trainer both use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.errors import InvalidArgument


def residuals(
    features: Sequence[Tensor],
    scale: float | int | Float[Tensor, " n"] = 1.0,
    factors: Sequence[float] = (1.0,),
    like: Tensor | None = None,
) -> dict[str, list[Tensor]]:
    """The UNet's keyword argument that adds these features: `unet(..., **residuals(features))`.

    Args:
        features: one (N, C, H, W) per place in the UNet, as an adapter returns them. They are not changed.
        scale: one factor for all, or one per row, shape (N,).
        factors: one per guidance branch; the N rows are laid out once for each, times that factor. With
            (1, 1) both branches get the same features; with (0, 1) the first gets none.
        like: a tensor (the latents) whose device and dtype the result takes.

    Returns:
        `{"down_intrablock_additional_residuals": [...]}`, a new list, since the UNet empties it; one
        (N * len(factors), C, H, W) per feature.
    """
    return {KEYWORD: scaled_rows(features, scale, factors, like)}


def scaled_rows(
    features: Sequence[Tensor],
    scale: float | int | Float[Tensor, " n"] = 1.0,
    factors: Sequence[float] = (1.0,),
    like: Tensor | None = None,
) -> list[Tensor]:
    """The features of all rows of a batch; arguments as `residuals`."""
    return [_laid_out(_scaled(feature, scale, like), factors) for feature in features]


def _scaled(feature: Tensor, scale: float | int | Tensor, like: Tensor | None) -> Tensor:
    if like is not None:
        feature = feature.to(device=like.device, dtype=like.dtype)
    if isinstance(scale, Tensor):
        if scale.shape != feature.shape[:1]:
            raise InvalidArgument("scale", f"shape ({len(feature)},)", f"shape {tuple(scale.shape)}")
        return feature * scale.to(feature).reshape(-1, *[1] * (feature.ndim - 1))
    return feature if scale == 1 else feature * scale


def _laid_out(feature: Tensor, factors: Sequence[float]) -> Tensor:
    if tuple(factors) == (1.0,):
        return feature
    blocks = {f: feature if f == 1 else feature * f if f else torch.zeros_like(feature) for f in set(factors)}
    return torch.cat([blocks[f] for f in factors])
