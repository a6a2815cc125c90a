"""Convert conditions and masks that users pass to a (K, C, H, W) tensor in [0, 1]."""

import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from nexus_adapters.choices import RESIZE_MODES, MapKind
from nexus_adapters.conditions.images import INVERTED_ABOVE, check_image
from nexus_adapters.conditions.maps import (
    NEARLY_BLACK,
    check_range,
    read_map,
    report_inverted,
    report_nearly_black,
    report_unless_lines,
)
from nexus_adapters.conditions.resize import ASPECT_TOLERANCE_PX, is_same_aspect, judge_kind
from nexus_adapters.errors import InvalidArgument, expect, warn_caller

if TYPE_CHECKING:
    Map: TypeAlias = Image.Image | Tensor | np.ndarray
    ConditionLike: TypeAlias = Map | Sequence[Image.Image] | Sequence[Tensor] | Sequence[np.ndarray]
else:
    ConditionLike = Any  # so that other types reach the errors of `as_condition`, also under pytest

LARGEST = 1.5  # longest side of an image, relative to the base's native size, without a warning

_IMAGE_MODES = {1: "L", 3: "RGB"}
# Modes that convert to 8-bit gray without loss. 16-bit and float modes would clip.
_PLAIN_MODES = ("1", "L", "P", "RGB")
_EXPECTED = (
    "a PIL image, a tensor ({c}, H, W) or (K, {c}, H, W), a NumPy array (H, W), (H, W, {c}), ({c}, H, W) or "
    "(K, H, W, {c}) or (K, {c}, H, W), of floats in [0, 1], uint8, or uint16 if gray, or a list of these "
    "with one map each"
)
_IMAGE_DTYPES = (torch.uint8, torch.uint16)
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 cannot compute
_VALUES = "floating point in [0, 1] with 16 bits or more, uint8, or uint16 if gray"
_TO_UINT8 = "Convert values from 0 to 255 to uint8, and True and False to floats"
ReadImage = Callable[[Image.Image], Image.Image]


def as_condition(
    value: ConditionLike,
    channels: int,
    name: str = "condition",
    kind: MapKind | None = None,
    invert: bool | None = None,
) -> Float[Tensor, "k c h w"]:
    """Return a copy of `value` as a tensor (K, channels, H, W) of floats in [0, 1].

    Images, and uint8 or uint16 arrays with an image's shape, are read by `read_map`: 16-bit depth, label ids,
    transparency and inverted lines become what the adapter was trained on, with a warning.

    Args:
        value: a map, or a list of maps of one size. A map is a PIL image; a tensor (channels, H, W) or
            (1, channels, H, W); or a NumPy array (H, W), (H, W, channels) or (channels, H, W). Outside a list
            it may also be a tensor (K, channels, H, W) or an array (K, H, W, channels) or (K, channels, H,
            W). Values are floats in [0, 1], uint8 from 0 to 255, or uint16 if gray. Gray arrays are repeated
            for all channels.
        channels: the adapter's `in_channels`; PIL images become RGB for 3 and gray for 1.
        name: the argument's name in errors.
        kind: kind of the maps, for `read_map`; None guesses it.
        invert: whether to invert the maps; None inverts dark lines on white.

    Raises:
        InvalidArgument: for other types, shapes or dtypes; arrays whose axes are ambiguous; mixed sizes; and
            values outside [0, 1] or not finite.
    """

    def read(image: Image.Image) -> Image.Image:
        return read_map(image, kind, invert=invert, name=name)

    condition, highest, means = _as_tensor(value, channels, name, read)
    if 0 < highest <= NEARLY_BLACK / 255:
        report_nearly_black(name, kind)
    if means and kind == "lines":
        report_photos(condition, name)
    if invert is None:
        inverted = [
            place
            for place, mean in enumerate(means)
            if mean > INVERTED_ABOVE and (kind or judged(condition[place])) == "lines"
        ]
        if inverted:
            report_inverted(name)
            condition[inverted] = 1 - condition[inverted]
    return 1 - condition if invert and means else condition


def judged(condition: Float[Tensor, "c h w"]) -> MapKind:
    """Guess the kind of a map, see `judge_kind`."""
    return judge_kind(_pixels(condition)) if len(condition) in _IMAGE_MODES else "image"


def report_photos(conditions: Float[Tensor, "k c h w"], name: str) -> None:
    """Warn of line maps that look like photos. Maps on an accelerator are not read: it would synchronize."""
    if conditions.device.type == "cpu" and conditions.shape[1] in _IMAGE_MODES:
        for condition in conditions:
            report_unless_lines(_pixels(condition), name)


def _pixels(condition: Float[Tensor, "c h w"]) -> UInt8[np.ndarray, "h w c"]:
    return (condition.detach().float() * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()


def as_mask(value: ConditionLike | None) -> Float[Tensor, "k 1 h w"] | None:
    """Return a copy of a mask as a tensor (K, 1, H, W) in [0, 1]; None for None.

    Args:
        value: like a condition with one channel: a PIL image (color becomes gray), a tensor, a NumPy array,
            or a list of these. The control acts where the mask is white.

    Raises:
        InvalidArgument: as `as_condition`, and for images with 16 bits or transparency.
    """
    return None if value is None else _as_tensor(value, 1, "mask", _opaque)[0]


def _as_tensor(
    value: ConditionLike, channels: int, name: str, read: ReadImage
) -> tuple[Tensor, float, list[float]]:
    """Return a copy of the maps; for floats also the highest value and each map's mean."""
    expected = _EXPECTED.format(c=channels)
    if value is None:
        raise InvalidArgument(name, expected, hint=f"Pass {expected}")
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if values and all(isinstance(v, Image.Image) for v in values):
        return _from_images([read(v) for v in values], channels, name), 0, []
    kind = next((kind for kind in (Tensor, np.ndarray) if all(isinstance(v, kind) for v in values)), None)
    if not values or kind is None:
        is_path = any(isinstance(each, str | os.PathLike) for each in values)
        hint = "Use load_image to read a file" if is_path else ""
        raise InvalidArgument(name, expected, _describe(value), hint)
    maps = [_with_axes(v, channels, expected, name) for v in values]
    if values[0] is not value and any(len(m) != 1 for m in maps):
        shapes = ", ".join(str(tuple(v.shape)) for v in values)
        raise InvalidArgument(name, expected, f"a list of shapes {shapes}")
    if len({m.shape for m in maps}) > 1:
        sizes = ", ".join(str(tuple(m.shape[1:])) for m in maps)
        raise InvalidArgument(name, "maps of one size", sizes)
    if len({(m.dtype, m.device) for m in maps}) > 1:
        kinds = ", ".join(sorted({f"{m.dtype} on {m.device}" for m in maps}))
        raise InvalidArgument(name, "maps of one dtype on one device", kinds)
    condition = torch.cat(maps) if len(maps) > 1 else maps[0]
    if condition.dtype in _IMAGE_DTYPES:
        return _from_images([read(image) for image in _images_of(condition, name)], channels, name), 0, []
    highest, means = _check_values(condition, name)
    # A copy, so that later writes to the caller's tensor cannot change the condition behind the features.
    return condition.expand(-1, channels, -1, -1).clone(), highest, means


def _with_axes(value: Tensor | np.ndarray, channels: int, expected: str, name: str) -> Tensor:
    """Return the array as (K, C, H, W), where C is the adapter's channels, or 1 for a gray NumPy array."""
    shape = tuple(value.shape)
    # Tensors have channels first by convention; arrays have no such convention.
    is_tensor = isinstance(value, Tensor)
    depths = (channels,) if is_tensor else (1, channels)
    first = len(shape) in (3, 4) and shape[-3] in depths
    last = not is_tensor and len(shape) in (3, 4) and shape[-1] in depths
    if first and last:
        received = f"shape {shape}, whose channels may be first or last"
        raise InvalidArgument(name, expected, received, "Pass a tensor, in which channels come first")
    is_flat = not is_tensor and len(shape) == 2
    if not (first or last or is_flat) or 0 in shape:
        raise InvalidArgument(name, expected, f"shape {shape}")
    found = value if isinstance(value, Tensor) else _tensor_of(value, name)
    if last:
        found = found.movedim(-1, -3)
    return found.reshape(-1, *found.shape[-3:]) if not is_flat else found[None, None]


def _tensor_of(value: np.ndarray, name: str) -> Tensor:
    if value.dtype.kind != "f" and value.dtype not in (np.uint8, np.uint16):
        raise InvalidArgument(name, _VALUES, value.dtype, _TO_UINT8)
    return torch.from_numpy(value.astype(np.float32) if value.dtype.kind == "f" else value.copy())


def _images_of(maps: Tensor, name: str) -> list[Image.Image]:
    pixels = maps.movedim(1, -1).cpu().numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    is_color = pixels.ndim == 4
    if is_color and (pixels.shape[-1] != 3 or pixels.dtype != np.uint8):
        raise InvalidArgument(
            name, "floating point in [0, 1], or gray", f"{maps.dtype} of shape {tuple(maps.shape)}"
        )
    return [Image.fromarray(each) for each in pixels]


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(sorted({type(v).__name__ for v in value})) or 'nothing'}"
    return f"{type(value).__name__}"


def _from_images(images: Sequence[Image.Image], channels: int, name: str) -> Float[Tensor, "k c h w"]:
    if channels not in _IMAGE_MODES:
        raise InvalidArgument(
            name,
            f"a tensor: the adapter reads {channels} channels, and images have 1 or 3",
            f"{len(images)} PIL image(s)",
        )
    sizes = {f"{image.width}x{image.height}" for image in images}
    if len(sizes) > 1:
        raise InvalidArgument(name, "images of one size", ", ".join(sorted(sizes)))
    arrays = [np.array(image.convert(_IMAGE_MODES[channels])) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).float() / 255
    return pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2)


def _opaque(image: Image.Image) -> Image.Image:
    check_image(image, "mask")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")  # fully opaque, so nothing is lost
    if image.mode not in _PLAIN_MODES or image.has_transparency_data:
        shown = f"mode {image.mode}" + (" with transparency" if image.has_transparency_data else "")
        raise InvalidArgument("mask", "an 8-bit RGB or gray image without transparency", shown)
    check_range(image, "mask")
    return image


def _check_values(condition: Tensor, name: str) -> tuple[float, list[float]]:
    """Check the values; return the highest one and the mean of each map."""
    if condition.dtype not in _FLOAT_DTYPES:
        raise InvalidArgument(name, _VALUES, condition.dtype, _TO_UINT8)
    # A single transfer, so that an accelerator synchronizes only once.
    given = condition.detach()
    ends, means = torch.stack(given.aminmax()), given.mean((1, 2, 3), dtype=torch.float32)
    low, high, *found = torch.cat([ends.float(), means]).tolist()
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise InvalidArgument(name, "finite values in [0, 1]", f"{low:g} to {high:g}")
    return high, found


def image_size(
    source: tuple[int, int],
    height: int | Any,
    width: int | Any,
    native: int,
    multiple: int,
    name: str = "image",
    sides: str = "height and width",
) -> tuple[int, int]:
    """Return (height, width) of the generated image, in pixels, for a source of this (height, width).

    If both `height` and `width` are given, they are used. If one is given, the other follows from the
    source's aspect ratio, rounded to the nearest `multiple`. If none is given, it is the source's size, each
    side rounded down to a `multiple`. Bases do not generate well far above the size that they were trained
    at, `native` x `native` pixels: if a side of the source is above `LARGEST` times that, the image has the
    base's area in the source's aspect ratio, with no side above the limit. A warning, which names `name` and
    the options `sides`, reports this. A given size above the limit is used, with a warning.

    Raises:
        InvalidArgument: for a height or width that is not a positive integer.
    """
    for argument, side in (("height", height), ("width", width)):
        is_whole = isinstance(side, Integral) and not isinstance(side, bool)
        expect(side is None or (is_whole and side > 0), argument, "a positive integer", repr(side))
    from_height, from_width = source
    limit = int(LARGEST * native)
    if height is not None or width is not None:
        if height is None:
            height = nearest_multiple(from_height * width / from_width, multiple)
        elif width is None:
            width = nearest_multiple(from_width * height / from_height, multiple)
        if max(height, width) > limit:
            warn_caller(
                f"{sides}: {width}x{height} pixels is more than {LARGEST:g} times the base's {native}, "
                "the size that it was trained at; images may be poor"
            )
        return height, width
    if max(source) <= limit:
        return _rounded_down(from_height, multiple), _rounded_down(from_width, multiple)
    factor = min(native / math.sqrt(from_height * from_width), limit / max(source))
    height, width = (
        min(nearest_multiple(side * factor, multiple), _rounded_down(limit, multiple)) for side in source
    )
    warn_caller(
        f"{name}: {from_width}x{from_height} pixels is more than {LARGEST:g} times the base's {native}, so "
        f"the image is {width}x{height}; set {sides} for another size"
    )
    return height, width


def _rounded_down(side: int, multiple: int) -> int:
    return max(1, side // multiple) * multiple


def nearest_multiple(side: float, multiple: int) -> int:
    """Return `side` rounded to the nearest `multiple`, at least one."""
    return max(1, round(side / multiple)) * multiple


def check_aspect(
    height: float,
    width: float,
    target_height: int,
    target_width: int,
    name: str = "condition",
    option: str = "resize_mode",
) -> None:
    """Raise `InvalidArgument` unless `is_same_aspect`; the hint names the `option` to fit the map."""
    if not is_same_aspect((width, height), (target_width, target_height)):
        raise InvalidArgument(
            name,
            f"the image's aspect ratio, within {ASPECT_TOLERANCE_PX} pixels",
            f"{width:g}x{height:g} pixels for an image of {target_width}x{target_height}",
            f"Set {option} to {', '.join(RESIZE_MODES[:-1])} or {RESIZE_MODES[-1]} to use it anyway",
        )
