"""Fit conditions and masks to the generated image's size and to the sizes of an adapter's features."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.choices import MapKind, ResizeMode
from nexus_adapters.conditions.resize import Box, placement, resize_planes
from nexus_adapters.injection.condition import check_aspect


def fit_condition(
    condition: Float[Tensor, "k c h w"],
    height: int,
    width: int,
    multiple: int,
    name: str = "condition",
    kind: MapKind = "image",
    resize_mode: ResizeMode | None = None,
    box: Box | None = None,
) -> Float[Tensor, "k c h_padded w_padded"]:
    """Resize the condition to `height` x `width` pixels, padded to the stem's multiple.

    Resizing depends on the kind (`conditions.resize`): lines keep their width and value, labels are not
    mixed, everything else is averaged over areas when it shrinks and interpolated when it grows. Padding
    repeats the last pixel at the right and the bottom, so the top left corner stays aligned with the latents.

    Args:
        condition: maps in [0, 1], (K, C, H, W). If they grow, or are averaged over blocks of whole pixels,
            they stay on their device and keep their gradient; otherwise, they go through the CPU.
        height: of the image, in pixels.
        width: of the image, in pixels.
        multiple: both sides of the result are multiples of this.
        name: the argument's name in errors.
        kind: kind of the maps.
        resize_mode: how to fit an aspect ratio that differs by more than `ASPECT_TOLERANCE_PX` pixels of the
            image: "stretch" scales each side separately, "crop" keeps the center, "pad" keeps all, with black
            around lines and repeated border pixels around other maps.
        box: the part to use, (left, top, right, bottom) in pixels of the condition; None for all.

    Returns:
        The maps, (K, C, padded height, padded width).

    Raises:
        InvalidArgument: for another aspect ratio without a `resize_mode`.
    """
    full = (0.0, 0.0, float(condition.shape[3]), float(condition.shape[2]))
    left, top, right, bottom = full if box is None else box
    target = (width, height)
    if resize_mode is None:
        check_aspect(bottom - top, right - left, height, width, name)
    placed = placement((left, top, right, bottom), target, resize_mode)
    fitted = _resized(condition, placed.size[::-1], kind, placed.box)
    rest = (width - placed.size[0] - placed.left, height - placed.size[1] - placed.top)
    around = (placed.left, rest[0], placed.top, rest[1])
    if any(around):
        fitted = F.pad(fitted, around) if kind == "lines" else F.pad(fitted, around, mode="replicate")
    return F.pad(fitted, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _resized(condition: Tensor, size: tuple[int, int], kind: MapKind, box: Box) -> Tensor:
    if all(side == int(side) for side in box):
        left, top, right, bottom = (int(side) for side in box)
        condition = condition[:, :, top:bottom, left:right]
        box = (0.0, 0.0, float(right - left), float(bottom - top))
        if condition.shape[2:] == size:
            return condition
        grows = condition.shape[2] < size[0] or condition.shape[3] < size[1]
        shrinks = condition.shape[2] > size[0] or condition.shape[3] > size[1]
        in_wholes = condition.shape[2] % size[0] == 0 and condition.shape[3] % size[1] == 0
        # PyTorch where it equals `resize_planes`: for other factors, its areas overlap.
        if kind in ("depth", "image") or (kind == "lines" and not shrinks):
            # In float32: half precision has no area kernel on the CPU, and edges are thin.
            pixels = condition.float()
            if grows:  # antialias: one side may shrink while the other grows
                resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
                return resized.clamp(0, 1).to(condition.dtype)
            if in_wholes:
                return F.interpolate(pixels, size, mode="area").clamp(0, 1).to(condition.dtype)
    planes = condition.detach().float().flatten(0, 1).cpu().numpy()
    resized = torch.from_numpy(resize_planes(np.ascontiguousarray(planes), size, kind, box))
    return resized.reshape(*condition.shape[:2], *size).to(condition)


def mask_levels(
    mask: Float[Tensor, "k 1 h w"], features: Sequence[Tensor], unshuffle: int
) -> list[Float[Tensor, "k 1 h_level w_level"]]:
    """Return the mask at every feature's size: the mean over the pixels that each value of the feature spans.

    It is pooled like an adapter's features, so both stay aligned. `mask` has the size of the condition that
    the adapter reads, a multiple of `unshuffle`.
    """
    level = F.avg_pool2d(mask, unshuffle)
    levels = []
    for feature in features:
        while level.shape[-1] > feature.shape[-1] or level.shape[-2] > feature.shape[-2]:
            level = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
        assert level.shape[-2:] == feature.shape[-2:]
        levels.append(level)
    return levels
