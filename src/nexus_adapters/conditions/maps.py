"""Reading a structure map as its users have it: what adapters are trained on is made of what is given.

Each repair is one warning, and can be prevented or stated exactly by an option.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nexus_adapters.choices import MapKind
from nexus_adapters.conditions.images import (
    GREY_16_BIT,
    check_image,
    is_transparent,
    looks_inverted,
    to_rgb,
)
from nexus_adapters.conditions.images import invert as exchanged
from nexus_adapters.conditions.resize import judge_kind
from nexus_adapters.conditions.segmentation import PALETTES, colored
from nexus_adapters.errors import InvalidArgument, warn_caller

UNITS = ("mm", "m", "inverse")
# Kind -> the options of `read_map`, as data.extractor, --option and Control take them.
MAP_OPTIONS: Mapping[MapKind, tuple[str, ...]] = {
    "lines": ("invert",),
    "depth": ("unit",),
    "labels": ("palette",),
    "image": (),
}

NO_PALETTE = "none"

# 8 m in millimeters are 12 % of what 16 bits hold. Depth that a model or a program wrote uses nearly all.
_NARROW = 65536 // 8
NEARLY_BLACK = 31  # of 255: maps that are no darker than that are left alone
_NO_CLASS = 255  # as most data sets have it


def read_map(
    image: Image.Image | Any,
    kind: MapKind | None = None,
    *,
    invert: bool | None = None,
    unit: str | None = None,
    palette: str = "auto",
    name: str = "condition",
) -> Image.Image:
    """Turn a structure map into what adapters of its kind read: RGB of the same size.

    - Lines that are dark on light are inverted.
    - 16-bit depth whose values span less than an eighth of what 16 bits hold, as millimeters do, is scaled by
      its own range. `unit` says exactly what the values are. 0, NaN and infinity are no measurement: black,
      as the farthest.
    - Label ids (grey, or a palette without colors) get the colors of a palette.
    - A map that is nearly black is left as it is, with a warning.
    - Transparent parts become black in depth and labels; else what the strokes contrast with.

    Args:
        image: a PIL image of any mode that `to_rgb` takes, or with a `unit` "F", floating point.
        kind: of the map; None to judge it by `judge_kind`, where 16 bits are depth and ids stay grey.
        invert: of lines: whether to exchange light and dark; None to do so where most is light.
        unit: of depth: "mm" or "m" for distances, which become nearness, 1 / distance from 0 at the farthest
            to 255; "inverse" for nearness, of which only the range is adjusted. None for nearness of 16 bits.
        palette: of label ids: a name in `segmentation.PALETTES`; "auto" is "ade20k", or "voc" for ids above
            its 150, and "none" leaves them. Id n gets the palette's color n, and 255 (no class) black.
        name: of the map in warnings and errors.

    Raises:
        InvalidArgument: named by the option for a wrong value or one of another kind of map, or `name` for an
            image that cannot be read.
    """
    if unit is not None and (unit not in UNITS or kind not in (None, "depth")):
        raise InvalidArgument("unit", f"one of {', '.join(UNITS)}, for depth", _of_kind(unit, kind))
    if palette != "auto" and kind != "labels":
        raise InvalidArgument("palette", "auto, or a map of labels", _of_kind(palette, kind))
    check_image(image, name)
    if unit is not None or (kind in (None, "depth") and image.mode in GREY_16_BIT):
        rgb = _from_depth(image, unit, name)
    elif kind == "labels" and (ids := _ids_of(image)) is not None:
        rgb = _colored(ids, palette, name)
    elif is_transparent(image):
        rgb = _on_background(image, kind, name)
    else:
        rgb = _rgb(image, name)
    highest = int(np.asarray(rgb).max())
    if kind != "labels" and 0 < highest <= NEARLY_BLACK:
        report_nearly_black(name)
    if invert is None and _is_dark_on_light(rgb, kind):
        report_inverted(name)
        invert = True
    return exchanged(rgb) if invert else rgb


def split_map_options(
    kind: MapKind, options: Mapping[str, object], extractors: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, object]]:
    """What of these options `read_map` takes for this kind of map, and what the extractor takes.

    `extractors`: the names of options that the extractor has; one that both have is in both.
    """
    names = MAP_OPTIONS[kind]
    mine = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names or name in extractors}
    return mine, others


def report_inverted(name: str) -> None:
    """Warn that a map of lines is inverted."""
    _report(name, "dark lines on white are inverted (invert=False or --no-invert prevents it)")


def report_nearly_black(name: str) -> None:
    """Warn of a map that an adapter will take for an empty one."""
    _report(
        name,
        f"no value is above {NEARLY_BLACK} of 255, which is nearly black; label ids get their colors by "
        'kind="labels" (--condition segmentation)',
    )


def _report(name: str, what: str) -> None:
    # The same text for every map of a data set, so that Python shows it once.
    warn_caller(f"{name}: {what}")


def _of_kind(value: object, kind: MapKind | None) -> str:
    return repr(value) if kind is None else f"{value!r} for a map of kind {kind}"


def check_range(image: Image.Image, name: str) -> None:
    """`InvalidArgument` where 8-bit values are 0 and 1: meant as black and white, they would all be black."""
    if image.mode != "1" and np.asarray(image.convert("RGB")).max() == 1:
        raise InvalidArgument(name, "values from 0 to 255", "0 to 1")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        rgb = to_rgb(image)
    except InvalidArgument as error:
        raise InvalidArgument(name, error.expected, error.received) from error
    check_range(rgb, name)
    return rgb


def _is_dark_on_light(rgb: Image.Image, kind: MapKind | None) -> bool:
    if kind not in (None, "lines") or not looks_inverted(rgb):
        return False
    return kind == "lines" or judge_kind(np.asarray(rgb)) == "lines"


def _from_depth(image: Image.Image, unit: str | None, name: str) -> Image.Image:
    is_read = image.mode in (*GREY_16_BIT, "F")
    values = np.asarray(image if is_read else _rgb(image, name).convert("L")).astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.any() or values[is_finite].min() < 0:
        raise InvalidArgument(name, "finite depth of at least 0", f"{values.min():g} to {values.max():g}")
    values[~is_finite] = 0  # how libraries mark what they could not measure
    if "transparency" in image.info and image.mode in GREY_16_BIT:
        values[values == image.info["transparency"]] = 0
    measured = values > 0
    if unit is None:
        if values.max() - values.min() >= _NARROW or np.unique(values[measured]).size < 2:
            return _rgb(image, name)
        _report(
            name,
            "16-bit depth that spans little of its range is scaled by its own range; for distances, where "
            "near is dark, give unit=mm or unit=m (--option unit=mm), and for nearness unit=inverse",
        )
    near = np.zeros_like(values)
    near[measured] = 1 / values[measured] if unit in ("mm", "m") else values[measured]
    low, high = (near[measured].min(), near[measured].max()) if measured.any() else (0.0, 0.0)
    scaled = (near - low) / (high - low) if high > low else np.zeros_like(near)
    return Image.fromarray(np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)).convert("RGB")


def _ids_of(image: Image.Image) -> UInt8[np.ndarray, "h w"] | None:
    """The label ids that the image holds, of which 255 is none; None where it holds colors."""
    if image.has_transparency_data or image.mode not in ("L", "P", *GREY_16_BIT):
        return None
    values = np.asarray(image)
    found = np.unique(values)
    # Only 0 and 255 are black and white.
    if found[0] < 0 or found[-1] > _NO_CLASS or not ((found > 0) & (found < _NO_CLASS)).any():
        return None
    if image.mode == "P":
        colors = np.asarray(image.convert("RGB"))
        if (colors != colors[..., :1]).any():
            return None
    return values.astype(np.uint8)


def _colored(ids: UInt8[np.ndarray, "h w"], palette: str, name: str) -> Image.Image:
    if palette == NO_PALETTE:
        return Image.fromarray(ids).convert("RGB")
    if palette not in ("auto", *PALETTES):  # an extractor of the user's own may have palettes of its own
        names = ", ".join(("auto", NO_PALETTE, *PALETTES))
        raise InvalidArgument("palette", f"one of {names}, for label ids", repr(palette))
    if palette == "auto":
        palette = "ade20k" if ids[ids < _NO_CLASS].max() < len(PALETTES["ade20k"]) else "voc"
    _report(
        name,
        f"label ids are colored by the palette {palette} (palette=voc or another chooses, "
        f"palette={NO_PALETTE} prevents it)",
    )
    return colored(np.where(ids == _NO_CLASS, -1, ids.astype(np.int64)), PALETTES[palette])


def _on_background(image: Image.Image, kind: MapKind | None, name: str) -> Image.Image:
    pixels = np.asarray(image.convert("RGBA"))
    is_visible = pixels[..., 3] > 127
    is_light = True
    if kind not in ("depth", "labels") and is_visible.any():
        mean = float(np.asarray(image.convert("RGB").convert("L"))[is_visible].mean())
        # What covers less than half is strokes. What covers more has a ground of its own, which goes on.
        is_light = (mean > 127) == bool(is_visible.mean() < 0.5)
    ground = "black" if is_light else "white"
    _report(name, f"transparent parts are laid on {ground}")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA")).convert("RGB")
