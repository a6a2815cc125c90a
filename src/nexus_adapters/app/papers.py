"""The colors that one draws with: those of a picture, or those that have a meaning in a structure map."""

from __future__ import annotations

from nexus_adapters.app.canvas import Paper
from nexus_adapters.choices import MapKind

_BLACK, _WHITE = "#000000", "#ffffff"
_PLAIN = (
    ("black", _BLACK),
    ("white", _WHITE),
    ("red", "#d8242c"),
    ("orange", "#f6881a"),
    ("yellow", "#f6de34"),
    ("green", "#2ea044"),
    ("cyan", "#42cede"),
    ("blue", "#284cd0"),
    ("purple", "#8a38ba"),
    ("pink", "#fa98c4"),
)
# Classes of ADE20K that photos often show, by their places in its list.
_COMMON = {
    "sky": 2,
    "building": 1,
    "tree": 4,
    "grass": 9,
    "road": 6,
    "water": 21,
    "mountain": 16,
    "person": 12,
    "car": 20,
    "wall": 0,
    "floor": 3,
    "table": 15,
    "chair": 19,
}
_DEPTHS = (("nearest", 255), ("near", 192), ("middle", 128), ("far", 64))


def picture_paper(size: int) -> Paper:
    """Return the paper for a picture of this side in pixels."""
    return Paper(_WHITE, _PLAIN, filled=True, thickness=max(2, size // 24))


def mask_paper(size: int) -> Paper:
    """Return the paper for a mask: white where the control acts."""
    return Paper(_BLACK, (("here", _WHITE),), filled=True, thickness=max(2, size // 8))


def map_paper(kind: MapKind, size: int, is_embedded: bool) -> Paper:
    """Return the paper for structure maps of a kind."""
    if kind == "lines":
        return Paper(_BLACK, (("line", _WHITE),), filled=False, thickness=max(1, size // 128))
    thick = max(2, size // 16)
    if kind == "labels":
        return Paper(_BLACK, _labels(is_embedded), filled=True, thickness=thick, has_names=True)
    if kind == "depth":
        grays = tuple((name, f"#{value:02x}{value:02x}{value:02x}") for name, value in _DEPTHS)
        return Paper(_BLACK, grays, filled=True, thickness=thick, has_names=True)
    return Paper(_BLACK, _PLAIN, filled=True, thickness=thick)


def _labels(is_embedded: bool) -> tuple[tuple[str, str], ...]:
    if is_embedded:
        from nexus_adapters.embedded.maps import SHAPE_COLORS

        return tuple((shape, _hex(color)) for shape, color in SHAPE_COLORS.items())
    from nexus_adapters.conditions.segmentation import PALETTES

    colors = PALETTES["ade20k"]
    return tuple((name, _hex(tuple(int(part) for part in colors[place]))) for name, place in _COMMON.items())


def _hex(color: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)
