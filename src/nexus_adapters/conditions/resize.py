"""Resize maps by their kind, and guess the kind if it is not declared.

The same rules apply to controls, aspect buckets, prepared sets, training and evaluation. Shrunk lines keep
their width and value: the map is max-pooled, then thinned. Labels take the nearest pixel, since labels have
    no
mean. Depth and photos are averaged over areas when they shrink and interpolated when they grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from nexus_adapters.choices import MapKind, ResizeMode

Box = tuple[float, float, float, float]  # (left, top, right, bottom), in pixels, may be fractional
Size = tuple[int, int]  # (width, height)
Plane = Float[np.ndarray, "_ _"]

ASPECT_TOLERANCE_PX = 8

_SURVIVES = 0.5  # share of a pixel's light that must remain when narrow strokes are removed
_LEVELS = 4  # quantiles of line coverage, removed one after the other in thinning
_FAINTEST = 1 / 16  # of the brightest line: fainter pixels are averaged, not thinned


def resize_map(
    image: Image.Image, size: tuple[int, int], kind: MapKind, box: Box | None = None
) -> Image.Image:
    """Resize a map, or the part of it in `box`, to `size`.

    Args:
        image: 8-bit RGB.
        size: (width, height) of the result.
        kind: kind of the map.
        box: the part, in pixels of `image`; None for all of it.

    Returns:
        The resized map, RGB.
    """
    box = (0, 0, *image.size) if box is None else box
    if kind == "lines" and _shrinks(size, box):
        planes = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        shrunk = shrink_lines(planes, (size[1], size[0]), box)
        return Image.fromarray(np.rint(255 * shrunk.transpose(1, 2, 0)).astype(np.uint8))
    return image.resize(size, _resampling(kind, size, box), box=box)


class Placement(NamedTuple):
    """Where a map goes in an image: the part of the map to use, its size in the image, and its position."""

    box: Box
    size: Size
    left: int
    top: int


def is_same_aspect(size: tuple[float, float], target: Size) -> bool:
    """Return whether two (width, height) have the same aspect ratio, up to `ASPECT_TOLERANCE_PX`."""
    excess_height = abs(size[1] * target[0] / size[0] - target[1])
    excess_width = abs(size[0] * target[1] / size[1] - target[0])
    # The smaller of the two, so that rounding one side to a multiple of 8 is allowed in a long thin image.
    return min(excess_height, excess_width) <= ASPECT_TOLERANCE_PX


def placement(box: Box, target: Size, resize_mode: ResizeMode | None) -> Placement:
    """Return where a part of a map goes in an image of size `target`, (width, height).

    If the aspect ratios match, the part covers the image in every mode. Otherwise "crop" uses the center of
    the part, "pad" leaves a border around it, and any other mode stretches it.
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if resize_mode not in ("crop", "pad") or is_same_aspect((width, height), target):
        return Placement(box, target, 0, 0)
    if resize_mode == "crop":
        aspect = target[0] / target[1]
        across, down = min(width, height * aspect), min(height, width / aspect)
        x, y = left + (width - across) / 2, top + (height - down) / 2
        return Placement((x, y, x + across, y + down), target, 0, 0)
    scale = min(target[0] / width, target[1] / height)
    inner = (max(1, min(target[0], round(width * scale))), max(1, min(target[1], round(height * scale))))
    return Placement(box, inner, (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2)


def padded(image: Image.Image, placed: Placement, target: Size, kind: MapKind) -> Image.Image:
    """Pad a placed map to size `target`: with black for lines, else by repeating its border pixels."""
    below, right = target[1] - image.height - placed.top, target[0] - image.width - placed.left
    around = ((placed.top, below), (placed.left, right), (0, 0))
    mode: Literal["constant", "edge"] = "constant" if kind == "lines" else "edge"
    return Image.fromarray(np.pad(np.asarray(image), around, mode=mode))


def fit_map(image: Image.Image, size: Size, kind: MapKind, resize_mode: ResizeMode | None) -> Image.Image:
    """Fit an RGB map to an image's (width, height); see `placement`."""
    placed = placement((0, 0, *image.size), size, resize_mode)
    return padded(resize_map(image, placed.size, kind, placed.box), placed, size, kind)


def resize_planes(
    planes: Float[np.ndarray, "n h w"], size: tuple[int, int], kind: MapKind, box: Box
) -> Float[np.ndarray, "n height width"]:
    """Resize maps in [0, 1], one channel per plane, as `resize_map`; `size` is (height, width)."""
    flipped = size[1], size[0]
    if kind == "lines" and _shrinks(flipped, box):
        return shrink_lines(planes, size, box)
    how = _resampling(kind, flipped, box)
    return np.stack([_by_pillow(plane, flipped, how, box) for plane in planes])


def _shrinks(size: Size, box: Box) -> bool:
    """Return whether any side shrinks."""
    return box[2] - box[0] > size[0] or box[3] - box[1] > size[1]


def _resampling(kind: MapKind, size: Size, box: Box) -> Image.Resampling:
    """Return the resampling filter for everything except lines that shrink."""
    if kind == "labels":
        return Image.Resampling.NEAREST
    # BOX would repeat the pixels of a side that grows. BILINEAR also averages a side that shrinks.
    grows = box[2] - box[0] < size[0] or box[3] - box[1] < size[1]
    return Image.Resampling.BILINEAR if grows else Image.Resampling.BOX


def _by_pillow(plane: Plane, size: tuple[int, int], how: Image.Resampling, box: Box) -> Plane:
    image = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(image.resize(size, how, box=box), np.float32)


def shrink_lines(
    planes: Float[np.ndarray, "n h w"], size: tuple[int, int], box: Box | None = None
) -> Float[np.ndarray, "n height width"]:
    """Shrink light lines on black without making them fainter, or thinner than a pixel.

    Each pixel of the result gets the maximum of its part of the map, so a stroke becomes no wider in pixels
    than it was; lines of 1 or 2 pixels are then thinned to one. Hatching too dense to leave gaps becomes an
    area of the lines' value. Areas wider than two pixels of the result are averaged, and so are pixels
    fainter than a sixteenth of the brightest line. A map with two values keeps these.

    Args:
        planes: maps in [0, 1], each shrunk separately.
        size: (height, width) of the result. A side that does not shrink is interpolated.
        box: the part to use, in pixels; None for all.
    """
    height, width = planes.shape[1:]
    box = (0, 0, width, height) if box is None else box
    known: dict[bytes, Plane] = {}
    for plane in planes:
        if plane.tobytes() not in known:
            known[plane.tobytes()] = _shrunk(np.asarray(plane, np.float32), size, box)
    return np.stack([known[plane.tobytes()] for plane in planes])


def _shrunk(plane: Plane, size: tuple[int, int], box: Box) -> Plane:
    left, top, right, bottom = box
    # Shrink first: a side that grows would spread the lines before they are detected.
    height, width = min(size[0], math.ceil(bottom - top)), min(size[1], math.ceil(right - left))
    rows, columns = _Cells(top, bottom, height), _Cells(left, right, width)
    mean = _averaged(plane, (width, height), box)
    peak = columns.highest(rows.highest(plane).T).T
    # A stroke of 1 or 2 pixels does not survive an opening by 3; an area survives one by two cells.
    hair = _opened_mean(plane, rows, columns, 0, box) <= _SURVIVES * mean
    area = _opened_mean(plane, rows, columns, 2, box) > _SURVIVES * mean
    highest = float(plane.max())
    is_lit = peak > _FAINTEST * highest
    # Thinning would turn an area full of lines into one line or a point. Tested on the mean, in which a pixel
    # counts once: with little shrinking, the peak of a single line is wide.
    hatching = _is_wide(is_lit & (mean > 0) & hair & ~area)
    lines = thinned(is_lit, hair & ~area & ~hatching, mean / np.maximum(peak, 1e-6))
    # Strokes of 3 pixels or more are not thinned: the maximum made none of them wider than it was.
    found = np.where(area | ~is_lit, mean, np.where(lines, peak, 0))
    if np.isin(plane, (0, highest)).all():
        found = np.where(found > highest / 2, highest, 0)
    if (height, width) != size:
        found = cv2.resize(found, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(found, np.float32)


def _averaged(plane: Plane, size: Size, box: Box) -> Plane:
    return _by_pillow(plane, size, Image.Resampling.BOX, box)


def _is_wide(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return the part of a mask that 3x3 squares inside the map can cover."""
    square = np.ones((3, 3), np.uint8)
    kept = cv2.morphologyEx(
        mask.astype(np.uint8), cv2.MORPH_OPEN, square, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)
    )
    return np.asarray(kept) > 0


def _opened_mean(plane: Plane, rows: _Cells, columns: _Cells, cells: int, box: Box) -> Plane:
    """Return the mean after removing strokes narrower than this many cells; 0 stands for 3 pixels."""
    square = np.ones((rows.odd_side(cells), columns.odd_side(cells)), np.uint8)
    opened = np.asarray(cv2.morphologyEx(np.ascontiguousarray(plane), cv2.MORPH_OPEN, square))
    return _averaged(opened, (columns.count, rows.count), box)


@dataclass(frozen=True)
class _Cells:
    """The parts of one side that become the pixels of the result."""

    start: float
    stop: float
    count: int

    @property
    def step(self) -> float:
        return (self.stop - self.start) / self.count

    def odd_side(self, cells: int) -> int:
        """Return this many cells in pixels, at least 3 and odd for a symmetric opening; 1 if growing."""
        return 1 if self.step <= 1 else max(3, 2 * math.floor(cells * self.step / 2) + 1)

    def highest(self, values: Plane) -> Plane:
        """Return the maximum over each part of the first axis; a pixel in two parts counts in both."""
        edges = self.start + np.arange(self.count + 1) * self.step
        # Rounded, so that a rounding error does not add a pixel.
        first = np.floor(np.round(edges[:-1], 6)).astype(int)
        last = np.ceil(np.round(edges[1:], 6)).astype(int)
        ends = np.stack([first, np.maximum(last, first + 1)], axis=1).ravel()
        padded = np.concatenate([values, values[-1:]])  # reduceat takes no index past the end
        return np.asarray(np.maximum.reduceat(padded, ends, axis=0)[::2])


# The eight neighbors of a pixel, clockwise from above, each a bit of its code.
_NEIGHBOR_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.float32)


def thinned(
    mask: Bool[np.ndarray, "h w"], free: Bool[np.ndarray, "h w"], weights: Plane
) -> Bool[np.ndarray, "h w"]:
    """Thin a mask to connected lines one pixel wide, removing the pixels with the lowest weights first.

    Guo and Hall 1989, "Parallel thinning with two-subiteration algorithms", algorithm A1.

    Args:
        mask: True on the lines.
        free: pixels that may be removed; the others stay.
        weights: how much of the line each pixel covers; the thinned lines follow the highest weights.
    """
    free = free & mask
    if not free.any():
        return mask
    mask = mask.astype(np.uint8)
    bounds = np.quantile(weights[free], np.linspace(0, 1, _LEVELS + 1)[1:])
    for bound in bounds:
        candidates = (free & (weights <= bound)).astype(np.uint8)
        changed = True
        while changed:
            changed = False
            for deletable in _guo_hall():
                codes = cv2.filter2D(mask, cv2.CV_8U, _NEIGHBOR_BITS, borderType=cv2.BORDER_CONSTANT)
                gone = cv2.LUT(codes, deletable) & candidates & mask
                if gone.any():
                    mask ^= gone
                    changed = True
    return np.asarray(mask == 1)


@cache
def _guo_hall() -> tuple[UInt8[np.ndarray, "256"], UInt8[np.ndarray, "256"]]:
    """Return, for each code of neighbors, whether a pixel can be removed in the first and second substep."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    n, ne, e, se, s, sw, w, nw = bits.T.astype(bool)
    parts = sum((~a & (b | c)).astype(int) for a, b, c in ((n, ne, e), (e, se, s), (s, sw, w), (w, nw, n)))
    pairs = [(nw | n, ne | e, se | s, sw | w), (n | ne, e | se, s | sw, w | nw)]
    neighbors = np.minimum(*(sum(pair.astype(int) for pair in four) for four in pairs))
    is_simple = (parts == 1) & (neighbors >= 2) & (neighbors <= 3)
    halves = (n | ne | ~se) & e, (s | sw | ~nw) & w
    first, second = ((is_simple & ~half).astype(np.uint8) for half in halves)
    return first, second


_DARK = 16  # of 255: still black, with the noise of JPEG
_MOST_FLAT_COLORS = 64
_GREY_WITHIN = 8  # of 255: largest difference between the channels of gray, with the noise of JPEG


def judge_kind(pixels: UInt8[np.ndarray, "h w c"]) -> MapKind:
    """Guess the kind of a map with 1 or 3 channels if it is not declared. Depth counts as "image" here.

    Lines are gray strokes, or any shapes of one gray, on black or white; labels are other maps with at most
    64 colors; everything else is "image". A wrong guess does little harm: areas in line maps are averaged as
    in images, and maps with few colors lose little by nearest-neighbor resizing.
    """
    darkest, lightest = pixels.min(axis=2), pixels.max(axis=2)
    colors = _flat_colors(pixels)
    if int((lightest - darkest).max()) > _GREY_WITHIN:
        return "labels" if colors else "image"
    for lightness in (lightest, 255 - darkest):
        is_black = (lightness <= _DARK).mean() >= 0.5 and lightness.max() > 2 * _DARK
        if is_black and (colors == 2 or _is_strokes(lightness)):
            return "lines"
    return "labels" if colors else "image"


def _flat_colors(pixels: UInt8[np.ndarray, "h w c"]) -> int:
    """Return the number of colors; 0 if there are too many for labels."""
    codes = np.zeros(pixels.shape[:2], np.uint32)
    for channel in np.moveaxis(pixels, 2, 0):
        codes = codes * 256 + channel
    found = np.unique(codes.ravel()[:: max(1, codes.size // 4096)])
    if len(found) > _MOST_FLAT_COLORS:  # a sample is checked first, for speed
        return 0
    found = np.unique(codes)
    return len(found) if len(found) <= _MOST_FLAT_COLORS else 0


def _is_strokes(lightness: UInt8[np.ndarray, "h w"]) -> bool:
    """Return whether most of the light on black is in strokes narrower than a fiftieth of the map."""
    side = max(7, 2 * (min(lightness.shape) // 100) + 1)
    opened = cv2.morphologyEx(lightness, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    return float(opened.sum(dtype=np.float64)) < 0.5 * float(lightness.sum(dtype=np.float64))
