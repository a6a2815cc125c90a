"""Read structure maps as users have them, and convert them to what adapters are trained on.

Each repair gives one warning, and an option prevents it or states exactly what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from nexus_adapters.choices import MapKind
from nexus_adapters.conditions.images import (
    GREY_16_BIT,
    check_image,
    is_transparent,
    looks_inverted,
    to_rgb,
)
from nexus_adapters.conditions.images import invert as inverted
from nexus_adapters.conditions.resize import judge_kind
from nexus_adapters.conditions.segmentation import PALETTES, colored
from nexus_adapters.errors import InvalidArgument, warn_caller

UNITS = ("mm", "m", "inverse")
# Kind -> options of `read_map` in data.extractor; --option takes them too, except `invert`.
MAP_OPTIONS: Mapping[MapKind, tuple[str, ...]] = {
    "lines": ("invert",),
    "depth": ("unit",),
    "labels": ("palette",),
    "image": (),
}

AUTO_PALETTE, NO_PALETTE = "auto", "none"
_DEFAULT_PALETTE = "ade20k"  # for any ids, so that a class has the same color in all maps of a dataset
_PALETTE_CHOICES = (AUTO_PALETTE, NO_PALETTE, *PALETTES)
# The grays in the palettes. A gray image with only these values may already be a colored map.
_PALETTE_GRAYS = {int(color[0]) for colors in PALETTES.values() for color in colors if len({*color}) == 1}

# 8 m in millimeters is 12% of the 16-bit range. Depth written by a model or a program uses nearly all of it.
_NARROW = 65536 // 8
NEARLY_BLACK = 31  # of 255: warn if no value of a map is above it
# A map of lines is mostly background. With these limits, anti-aliased, colored and inverted drawings, pencil
# on gray paper and soft edges pass; photos in color, most gray ones, segmentations and depth do not.
_COLORFUL = 48  # of 255: difference between the channels; JPEG's noise is below it
_MOST_COLORED = 0.05  # share of pixels in colored areas
_WIDER_THAN_STROKES = 7  # pixels, of those that are judged
_MID_GRAYS = (48, 207)
_MOST_MID_GRAY = 0.55  # share of pixels that are neither dark nor light
_LEAST_BACKGROUND = 0.45  # share of pixels with nearly the same brightness
_BACKGROUND_WITHIN = 24  # of 255: how far a background varies
_JUDGED_SIDE = 256  # pixels; of larger maps, only every nth pixel is judged, which takes milliseconds
_NO_CLASS = 255  # the usual id of pixels without a class


def read_map(
    image: Image.Image | Any,
    kind: MapKind | None = None,
    *,
    invert: bool | Any = None,
    unit: str | Any = None,
    palette: str | Any = AUTO_PALETTE,
    name: str = "condition",
) -> Image.Image:
    """Convert a structure map to what adapters of its kind read: RGB of the same size.

    - Dark lines on a light background are inverted.
    - 16-bit depth whose values span less than an eighth of the 16-bit range, as millimeters do, is scaled by
      its own range. `unit` states exactly what the values are. 0, NaN and infinity mean "not measured" and
      become black, the farthest.
    - Label ids (gray, or a palette without colors) get the colors of a palette. Gray RGB is treated as
      colors, with a warning, unless a palette is named.
    - A map that is nearly black stays as it is, with a warning; so does a line map that looks like a photo.
    - Transparent parts become black in depth and labels; in other maps, the color that contrasts with the
      strokes.

    Args:
        image: a PIL image of any mode that `to_rgb` takes; with `unit`, also of mode "F" (floating point).
        kind: kind of the map; None guesses it with `judge_kind`, treats 16 bits as depth and keeps ids gray.
        invert: whether to invert a map of any kind; None inverts line maps that are mostly light.
        unit: for depth: "mm" or "m" for distances, which become nearness (1 / distance, scaled to 0 at the
            farthest and 255 at the nearest); "inverse" for nearness, which is only scaled. None for 16-bit
            nearness.
        palette: for label ids: a name in `segmentation.PALETTES`; "auto" is "ade20k", and "none" leaves them
            gray. Id n gets color n of the palette; 255 (no class) becomes black. With "auto", an image with
            only 0 and 255 is treated as black and white.
        name: the map's name in warnings and errors.

    Raises:
        InvalidArgument: named after the option, for a wrong value or one for another kind of map; or `name`,
            for an image that cannot be read or label ids that the palette has no color for.
    """
    return read_and_invert(image, kind, invert=invert, unit=unit, palette=palette, name=name)[0]


def read_and_invert(
    image: Image.Image | Any,
    kind: MapKind | None = None,
    *,
    invert: bool | Any = None,
    unit: str | Any = None,
    palette: str | Any = AUTO_PALETTE,
    name: str = "condition",
) -> tuple[Image.Image, bool]:
    """Read a map as `read_map` does, and also return whether it was inverted."""
    check_invert(invert)
    if unit is not None and (not is_choice(unit, UNITS) or kind not in (None, "depth")):
        raise InvalidArgument("unit", f"one of {', '.join(UNITS)}, for depth", _of_kind(unit, kind))
    if not is_choice(palette, _PALETTE_CHOICES):
        raise InvalidArgument("palette", f"one of {', '.join(_PALETTE_CHOICES)}", repr(palette))
    if palette != AUTO_PALETTE and kind != "labels":
        raise InvalidArgument("palette", "auto, or a map of kind labels", _of_kind(palette, kind))
    check_image(image, name)
    if unit is not None or (kind in (None, "depth") and image.mode in GREY_16_BIT):
        rgb = _from_depth(image, unit, name)
    elif kind == "labels" and (ids := _ids_of(image, palette, name)) is not None:
        rgb = _colored(ids, palette, name)
    elif is_transparent(image):
        rgb = _on_background(image, kind, name)
    else:
        rgb = _rgb(image, name, kind)
    highest = int(np.asarray(rgb).max())
    if palette != NO_PALETTE and 0 < highest <= NEARLY_BLACK:
        report_nearly_black(name, kind)
    if kind == "lines":
        report_unless_lines(np.asarray(rgb), name)
    if invert is None and _is_dark_on_light(rgb, kind):
        report_inverted(name)
        invert = True
    return (inverted(rgb), True) if invert else (rgb, False)


def check_invert(value: object) -> None:
    """Raise `InvalidArgument` unless `value` is True, False or None."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise InvalidArgument("invert", "True, False or None", repr(value))


def is_choice(value: object, choices: Collection[str]) -> bool:
    """Return whether `value` is one of these strings; safe for arrays, which compare by element."""
    return isinstance(value, str) and value in choices


def split_map_options(
    kind: MapKind, options: Mapping[str, object], extractors: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, object]]:
    """Split options into those of `read_map` for this kind of map, and those of the extractor.

    `extractors` names the extractor's options; an option that both have is in both results.
    """
    names = MAP_OPTIONS[kind]
    mine = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names or name in extractors}
    return mine, others


def report_inverted(name: str) -> None:
    """Warn that a line map is inverted."""
    _report(name, "mostly light line maps are inverted (invert=False or --no-invert prevents it)")


def report_nearly_black(name: str, kind: MapKind | None) -> None:
    """Warn of a map that looks empty to an adapter."""
    if kind == "labels":
        hint = "label ids are colored in gray images (mode L or P) and in uint8 arrays"
    else:
        hint = 'label ids are colored with kind="labels" (--condition segmentation)'
    _report(name, f"the map is nearly black: no value is above {NEARLY_BLACK} of 255; {hint}")


def report_unless_lines(pixels: UInt8[np.ndarray, "h w c"], name: str) -> None:
    """Warn of a line map that looks like a photo, or like a segmentation or depth map."""
    if not _may_be_lines(pixels):
        _report(
            name,
            "this looks like a photo or another kind of map, not like a line map; extract the lines of a "
            "photo first (--image, or in Python extract(NAME, photo)); other maps need an adapter for them",
        )


def _may_be_lines(pixels: UInt8[np.ndarray, "h w c"]) -> bool:
    """Return whether a map has no large colored areas and is mostly dark, light, or one gray background."""
    step = -(-min(pixels.shape[:2]) // _JUDGED_SIDE)
    first, *others = (pixels[::step, ::step, channel] for channel in range(pixels.shape[2]))
    darkest = lightest = first
    for channel in others:
        darkest, lightest = np.minimum(darkest, channel), np.maximum(lightest, channel)
    colored = (lightest - darkest > _COLORFUL).astype(np.uint8)
    if colored.mean() > _MOST_COLORED:
        square = np.ones((_WIDER_THAN_STROKES, _WIDER_THAN_STROKES), np.uint8)
        areas = cv2.morphologyEx(colored, cv2.MORPH_OPEN, square)
        if areas.mean() > _MOST_COLORED:
            return False
    counts = np.bincount(((darkest.astype(np.uint16) + lightest) // 2).ravel(), minlength=256) / darkest.size
    low, high = _MID_GRAYS
    background = np.convolve(counts, np.ones(2 * _BACKGROUND_WITHIN + 1)).max()
    return bool(counts[low : high + 1].sum() <= _MOST_MID_GRAY or background >= _LEAST_BACKGROUND)


def _report(name: str, what: str) -> None:
    # The same text for every map of a dataset, so that Python shows it once.
    warn_caller(f"{name}: {what}")


def _of_kind(value: object, kind: MapKind | None) -> str:
    return repr(value) if kind is None else f"{value!r} for a map of kind {kind}"


def check_range(image: Image.Image, name: str) -> None:
    """Raise `InvalidArgument` for 8-bit values of 0 and 1: meant as black and white, all would be black."""
    if image.mode != "1" and np.asarray(image.convert("RGB")).max() == 1:
        raise InvalidArgument(name, "values from 0 to 255", "0 to 1")


def _rgb(image: Image.Image, name: str, kind: MapKind | None) -> Image.Image:
    try:
        rgb = to_rgb(image)
    except InvalidArgument as error:
        is_unknown = image.mode == "F" and kind in (None, "depth")
        hint = f"Use {_option('depth', 'unit', 'm')}, or the unit mm or inverse" if is_unknown else ""
        raise InvalidArgument(name, error.expected, error.received, hint) from error
    check_range(rgb, name)
    return rgb


def _option(kind: MapKind, option: str, value: str) -> str:
    """Return how to write an option on the command line and in Python (`Control` does not take it)."""
    return f'--option {option}={value} (in Python, read_map(image, "{kind}", {option}="{value}"))'


def _is_dark_on_light(rgb: Image.Image, kind: MapKind | None) -> bool:
    if kind not in (None, "lines") or not looks_inverted(rgb):
        return False
    return kind == "lines" or judge_kind(np.asarray(rgb)) == "lines"


def _from_depth(image: Image.Image, unit: str | None, name: str) -> Image.Image:
    is_read = image.mode in (*GREY_16_BIT, "F")
    values = np.asarray(image if is_read else _rgb(image, name, "depth").convert("L")).astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.any() or values[is_finite].min() < 0:
        raise InvalidArgument(name, "finite depth of at least 0", f"{values.min():g} to {values.max():g}")
    values[~is_finite] = 0  # how libraries mark what they could not measure
    if "transparency" in image.info and image.mode in GREY_16_BIT:
        values[values == image.info["transparency"]] = 0
    measured = values > 0
    if unit is None:
        if values.max() - values.min() >= _NARROW or np.unique(values[measured]).size < 2:
            return _rgb(image, name, "depth")
        _report(
            name,
            "16-bit depth that uses little of the range is scaled by its own range; for distances, where "
            f"near is dark, use {_option('depth', 'unit', 'mm')} or the unit m; for nearness, use inverse",
        )
    near = np.zeros_like(values)
    near[measured] = 1 / values[measured] if unit in ("mm", "m") else values[measured]
    low, high = (near[measured].min(), near[measured].max()) if measured.any() else (0.0, 0.0)
    scaled = (near - low) / (high - low) if high > low else np.zeros_like(near)
    return Image.fromarray(np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)).convert("RGB")


def _ids_of(image: Image.Image, palette: str, name: str) -> UInt8[np.ndarray, "h w"] | None:
    """Return the image's label ids, in which 255 is no class; None if it holds colors."""
    values = _gray_values(image)
    if values is None:
        return None
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _NO_CLASS:
        received = f"{low} to {high} in mode {image.mode!r}"
        raise InvalidArgument(name, f"label ids from 0 to {_NO_CLASS}", received)
    found = np.unique(values)
    if image.mode in ("RGB", "RGBA"):
        if _PALETTE_GRAYS.issuperset(found.tolist()):
            return None
        if palette == AUTO_PALETTE:
            _report(
                name,
                "gray RGB is treated as colors; label ids are colored in gray images (mode L or P), or with "
                f"{_option('labels', 'palette', _DEFAULT_PALETTE)}",
            )
            return None
    # An image with only 0 and 255 is black and white, unless the caller names a palette.
    if palette == AUTO_PALETTE and not ((found > 0) & (found < _NO_CLASS)).any():
        return None
    return values.astype(np.uint8)


def _gray_values(image: Image.Image) -> Integer[np.ndarray, "h w"] | None:
    """Return the values of an image without colors or transparent parts; None for any other image."""
    if is_transparent(image):
        return None
    if image.mode in ("L", *GREY_16_BIT):
        return np.asarray(image)
    if image.mode == "P":  # by the whole palette: the colors in use may all be gray
        colors = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        return None if (colors != colors[:, :1]).any() else np.asarray(image)
    if image.mode == "LA":
        return np.asarray(image)[..., 0]
    if image.mode not in ("RGB", "RGBA"):
        return None
    pixels = np.asarray(image)[..., :3]
    return None if (pixels != pixels[..., :1]).any() else pixels[..., 0]


def _colored(ids: UInt8[np.ndarray, "h w"], palette: str, name: str) -> Image.Image:
    if palette == NO_PALETTE:
        return Image.fromarray(ids).convert("RGB")
    palette = _DEFAULT_PALETTE if palette == AUTO_PALETTE else palette
    colors = PALETTES[palette]
    highest = int(ids[ids < _NO_CLASS].max(initial=0))
    if highest >= len(colors):
        raise InvalidArgument(
            name,
            f"label ids below {len(colors)}, the number of colors in the palette {palette}",
            highest,
            f"Use {_option('labels', 'palette', 'voc')}, which has 256, or the palette {NO_PALETTE}",
        )
    _report(
        name,
        f"label ids are colored with the palette {palette}; {_option('labels', 'palette', 'voc')} selects "
        f"another palette, and palette={NO_PALETTE} leaves them gray",
    )
    return colored(np.where(ids == _NO_CLASS, -1, ids.astype(np.int64)), colors)


def _on_background(image: Image.Image, kind: MapKind | None, name: str) -> Image.Image:
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    is_visible = alpha > 0
    is_light = True
    if kind not in ("depth", "labels") and is_visible.any():
        lightness = np.asarray(image.convert("RGBA").convert("RGB").convert("L"))
        mean = float(np.average(lightness, weights=alpha))
        # Less than half visible: strokes. More: the map has its own background, which is continued.
        is_light = (mean > 127) == bool(is_visible.mean() < 0.5)
    ground = "black" if is_light else "white"
    rgb = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA")).convert("RGB")
    is_lost = not np.asarray(rgb).any()
    _report(name, f"transparent parts become {ground}" + (", and the whole map is black" if is_lost else ""))
    return rgb
