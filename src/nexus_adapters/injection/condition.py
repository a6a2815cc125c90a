"""Conditions and masks: what users pass becomes a (K, C, H, W) tensor in [0, 1] of the right size."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexus_adapters.errors import InvalidArgument, warn_caller

if TYPE_CHECKING:
    ConditionLike: TypeAlias = Image.Image | Tensor | Sequence[Image.Image] | Sequence[Tensor]
else:
    ConditionLike = Any  # so that under pytest, too, anything else meets the errors of `as_condition`

ASPECT_TOLERANCE_PX = 8
LARGEST = 1.5  # a side of an image whose size is not given, in native sizes of the base

_IMAGE_MODES = {1: "L", 3: "RGB"}
# Modes that convert to 8-bit RGB or grey without loss of what they show. 16-bit and float modes would clip.
_PLAIN_MODES = ("1", "L", "P", "RGB")
_EXPECTED = (
    "a PIL image, a tensor (B, {c}, H, W) in [0, 1], or a list of PIL images or of tensors "
    "({c}, H, W) or (1, {c}, H, W)"
)


def as_condition(value: ConditionLike, channels: int, name: str = "condition") -> Float[Tensor, "k c h w"]:
    """A copy of `value` as a tensor (K, channels, H, W) of floats in [0, 1].

    Args:
        value: a PIL image, a tensor (K, channels, H, W) in [0, 1], or a list of PIL images or of tensors
            (channels, H, W) or (1, channels, H, W), all of one size.
        channels: the adapter's `in_channels`; PIL images become RGB for 3 and grey for 1.
        name: the argument's name in error messages.

    Raises:
        InvalidArgument: for other types, shapes or dtypes, mixed sizes, values outside [0, 1] or not finite,
            and images with transparency.
    """
    expected = _EXPECTED.format(c=channels)
    if value is None:
        raise InvalidArgument(name, expected, hint=f"Give {expected}")
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    are_images = bool(values) and all(isinstance(v, Image.Image) for v in values)
    if are_images:
        condition = _from_images(values, channels, name)
    elif isinstance(value, Tensor):
        condition = value
    elif values and all(isinstance(v, Tensor) for v in values):
        condition = _from_tensors(values, expected, name)
    else:
        raise InvalidArgument(name, expected, _describe(value))
    if condition.ndim != 4 or condition.shape[1] != channels or 0 in condition.shape:
        raise InvalidArgument(name, expected, f"shape {tuple(condition.shape)}")
    if are_images:  # in [0, 1] by their type
        return condition
    _check_values(condition, name)
    # A copy, so that later writes to the caller's tensor cannot part the features from their condition.
    return condition.clone()


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return f"{type(value).__name__}"


def _from_images(images: Sequence[Image.Image], channels: int, name: str) -> Float[Tensor, "k c h w"]:
    if channels not in _IMAGE_MODES:
        raise InvalidArgument(
            name,
            f"a tensor, since the adapter reads {channels} channels and images have 1 or 3",
            f"{len(images)} PIL image(s)",
        )
    sizes = {f"{image.width}x{image.height}" for image in images}
    if len(sizes) > 1:
        raise InvalidArgument(name, "images of one size", ", ".join(sorted(sizes)))
    arrays = [np.array(_opaque(image, name).convert(_IMAGE_MODES[channels])) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).float() / 255
    return pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2)


def _opaque(image: Image.Image, name: str) -> Image.Image:
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")  # nothing shows through, so nothing is lost
    if image.mode not in _PLAIN_MODES or image.has_transparency_data:
        shown = f"mode {image.mode}" + (" with transparency" if image.has_transparency_data else "")
        raise InvalidArgument(name, "an 8-bit RGB or grey image without transparency", shown)
    return image


def _from_tensors(tensors: Sequence[Tensor], expected: str, name: str) -> Tensor:
    maps = [t.unsqueeze(0) if t.ndim == 3 else t for t in tensors]
    if any(m.ndim != 4 or len(m) != 1 for m in maps):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise InvalidArgument(name, expected, f"a list of shapes {shapes}")
    if len({m.shape for m in maps}) > 1:
        sizes = ", ".join(str(tuple(m.shape[1:])) for m in maps)
        raise InvalidArgument(name, "tensors of one size", sizes)
    if len({(m.dtype, m.device) for m in maps}) > 1:
        kinds = ", ".join(sorted({f"{m.dtype} on {m.device}" for m in maps}))
        raise InvalidArgument(name, "tensors of one dtype on one device", kinds)
    return torch.cat(maps)


def _check_values(condition: Tensor, name: str) -> None:
    if not condition.is_floating_point():
        raise InvalidArgument(name, "floating point in [0, 1]", condition.dtype)
    # One transfer, for which an accelerator is waited for once.
    low, high = torch.stack(condition.detach().aminmax()).tolist()
    if not (low >= 0 and high <= 1):  # also where one of them is not a number
        raise InvalidArgument(name, "finite values in [0, 1]", f"{low:g} to {high:g}")


def fit_condition(
    condition: Float[Tensor, "k c h w"], height: int, width: int, multiple: int, name: str = "condition"
) -> Float[Tensor, "k c h_padded w_padded"]:
    """The condition at `height` x `width` pixels, padded to the multiple that the adapter's stem needs.

    Resized by area where it shrinks and bilinearly where it grows; padded at the right and the bottom by
    repeating the last pixel, so that the top left corner stays aligned with the latents'.

    Raises:
        InvalidArgument: where the aspect differs by more than `ASPECT_TOLERANCE_PX` of the target's pixels.
    """
    if condition.shape[2:] != (height, width):
        check_aspect(condition.shape[2], condition.shape[3], height, width, name)
        shrinks = condition.shape[2] >= height and condition.shape[3] >= width
        # In float32: half precision has no area kernel on the CPU, and edges are thin.
        pixels, size = condition.float(), (height, width)
        if shrinks:
            resized = F.interpolate(pixels, size, mode="area")
        else:  # antialias: one side may shrink while the other grows
            resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        condition = resized.clamp(0, 1).to(condition.dtype)
    return F.pad(condition, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def image_size(
    source: tuple[int, int],
    height: int | None,
    width: int | None,
    native: int,
    multiple: int,
    name: str = "image",
) -> tuple[int, int]:
    """(height, width) of the image that is generated after a source of this (height, width).

    Both given: these. One given: the other by the source's aspect, to the nearest `multiple`. None: the
    source's size, each side rounded down to a `multiple`. But no base generates well far above the size that
    it was trained at, `native` x `native` pixels: where a side of the source is above `LARGEST` times that,
    the base's area in the source's aspect, no side above that limit. A warning says so, and names `name`.
    """
    from_height, from_width = source
    if height is not None and width is not None:
        return height, width
    if height is not None:
        return height, nearest_multiple(from_width * height / from_height, multiple)
    if width is not None:
        return nearest_multiple(from_height * width / from_width, multiple), width
    limit = int(LARGEST * native)
    if max(source) <= limit:
        return _rounded_down(from_height, multiple), _rounded_down(from_width, multiple)
    factor = min(native / math.sqrt(from_height * from_width), limit / max(source))
    height, width = (
        min(nearest_multiple(side * factor, multiple), _rounded_down(limit, multiple)) for side in source
    )
    warn_caller(
        f"{name}: {from_width}x{from_height} pixels are more than {LARGEST:g} times the base's {native}, so "
        f"the image is {width}x{height}; set height and width for another size"
    )
    return height, width


def _rounded_down(side: int, multiple: int) -> int:
    return max(1, side // multiple) * multiple


def nearest_multiple(side: float, multiple: int) -> int:
    """At least one `multiple`."""
    return max(1, round(side / multiple)) * multiple


def check_aspect(
    height: int, width: int, target_height: int, target_width: int, name: str = "condition"
) -> None:
    """Raise unless a uniform scaling takes the one size to the other, up to `ASPECT_TOLERANCE_PX`."""
    excess_height = abs(height * target_width / width - target_height)
    excess_width = abs(width * target_height / height - target_width)
    # The smaller of the two: rounding one side to a multiple of 8 must pass, also in a long thin image.
    if min(excess_height, excess_width) > ASPECT_TOLERANCE_PX:
        raise InvalidArgument(
            name,
            f"the image's aspect ratio, within {ASPECT_TOLERANCE_PX} pixels",
            f"{width}x{height} pixels for an image of {target_width}x{target_height}",
        )


def as_mask(value: ConditionLike | None) -> Float[Tensor, "k 1 h w"] | None:
    """A copy as (K, 1, H, W) in [0, 1]; None for none.

    Args:
        value: as a condition of one channel: a PIL image (color becomes grey), a tensor (K, 1, H, W) in
            [0, 1], or a list of PIL images or of tensors (1, H, W) or (1, 1, H, W). White acts.

    Raises:
        InvalidArgument: as `as_condition`.
    """
    return None if value is None else as_condition(value, channels=1, name="mask")


def mask_levels(
    mask: Float[Tensor, "k 1 h w"], features: Sequence[Tensor], unshuffle: int
) -> list[Float[Tensor, "k 1 h_level w_level"]]:
    """The mask at every feature's size: the mean over the pixels that each of its values spans.

    Pooled as adapters pool their features, so that both stay aligned. `mask` has the size of the condition
    as the adapter reads it, which is a multiple of `unshuffle`.
    """
    level = F.avg_pool2d(mask, unshuffle)
    levels = []
    for feature in features:
        while level.shape[-1] > feature.shape[-1] or level.shape[-2] > feature.shape[-2]:
            level = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
        assert level.shape[-2:] == feature.shape[-2:]
        levels.append(level)
    return levels
