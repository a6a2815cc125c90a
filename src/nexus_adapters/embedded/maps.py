"""A scene's structure maps. All but canny are exact: computed from the scene, not from its pixels."""

from __future__ import annotations

import math
from random import Random

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from nexus_adapters.conditions import canny
from nexus_adapters.embedded.render import Rendering, outline, render
from nexus_adapters.embedded.scene import SHAPES, SIZE, Scene, SceneObject
from nexus_adapters.errors import InvalidArgument

MAPS = ("canny", "depth", "segmentation", "sketch")

# The color of each shape's class in a segmentation map: corners and edges of the RGB cube that differ by at
# least 127 in one channel. It is independent of the object's own color.
SHAPE_COLORS: dict[str, tuple[int, int, int]] = dict(
    zip(
        SHAPES,
        (
            (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0),
            (255, 0, 255), (0, 255, 255), (255, 255, 255), (255, 128, 0),
        ),
        strict=True,
    )
)  # fmt: skip
BACKGROUND_COLOR = (0, 0, 0)

_FIXED_POINT_BITS = 4  # fractional bits of OpenCV's line coordinates
_STROKE_STEP = 2.0  # pixels between the points of a stroke
_JITTER = 0.9  # pixels; standard deviation of a stroke's slow drift from the contour
_DRIFT_LENGTH = 14.0  # pixels along the stroke over which the drift changes
_GAP_EVERY, _GAP_LENGTH = 45.0, (3.0, 8.0)  # pixels: average distance of gaps; range of their lengths


def depth_map(rendering: Rendering) -> UInt8[np.ndarray, "h w 3"]:
    """Return a map of nearness: 0 for the background, 255 for the nearest object, equal steps in between.

    Objects are flat and face the viewer, so each has one value. A pixel has the value of what covers most of
    it.
    """
    count = len(rendering.visible)
    nearness = np.rint(np.linspace(0, 255, count + 1)).astype(np.uint8)
    grey = nearness[_labels(rendering)]
    return np.repeat(grey[..., None], 3, axis=2)


def segmentation_map(scene: Scene, rendering: Rendering) -> UInt8[np.ndarray, "h w 3"]:
    """Return the color of each pixel's shape class (`SHAPE_COLORS`); black for the background."""
    colors = [BACKGROUND_COLOR, *(SHAPE_COLORS[item.shape] for item in scene.objects)]
    return np.asarray(np.asarray(colors, np.uint8)[_labels(rendering)])


def sketch_map(scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    """Return the visible contours as hand-drawn strokes, white on black: off by about a pixel, with gaps.

    The same scene always gives the same strokes.
    """
    rng = np.random.default_rng(Random(f"nexus sketch {scene!r}").getrandbits(64))
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for item in scene.objects:
        strokes = [_hand_drawn(contour, rng) for contour in _contours(item)]
        cv2.fillPoly(canvas, [_fixed_point(stroke) for stroke in strokes], 0, shift=_FIXED_POINT_BITS)
        for stroke in strokes:
            parts = [_fixed_point(part) for part in _with_gaps(stroke, rng)]
            cv2.polylines(canvas, parts, False, 255, 1, cv2.LINE_AA, shift=_FIXED_POINT_BITS)
    return np.repeat(canvas[..., None], 3, axis=2)


def draw_map(condition_name: str, scene: Scene, rendering: Rendering | None = None) -> Image.Image:
    """Return one of a scene's maps.

    Args:
        condition_name: one of `MAPS`. "canny" is extracted from the image; the others are exact.
        scene: the scene.
        rendering: the rendering of this scene, if you already have it.

    Returns:
        The map: RGB, 128x128.

    Raises:
        InvalidArgument: for an unknown `condition_name`.
    """
    if condition_name not in MAPS:
        raise InvalidArgument("condition_name", f"one of {', '.join(MAPS)}", repr(condition_name))
    if condition_name == "sketch":
        return Image.fromarray(sketch_map(scene))
    rendering = render(scene) if rendering is None else rendering
    if condition_name == "canny":
        return canny(Image.fromarray(rendering.image))
    if condition_name == "depth":
        return Image.fromarray(depth_map(rendering))
    return Image.fromarray(segmentation_map(scene, rendering))


def _labels(rendering: Rendering) -> np.ndarray:
    """What covers most of each pixel: 0 for the background, 1 for the farthest object; nearer for ties."""
    shares = np.concatenate([rendering.background_visible[None], rendering.visible])
    return np.asarray(len(shares) - 1 - shares[::-1].argmax(axis=0))


def _contours(item: SceneObject) -> list[Float[np.ndarray, "points 2"]]:
    """The object's contours in pixels, (x, y); 0 is the corner of the first pixel."""
    cos, sin = math.cos(item.rotation), math.sin(item.rotation)
    turn = np.array([[cos, sin], [-sin, cos]]) * item.radius
    return [contour @ turn + [item.x, item.y] for contour in outline(item.shape)]


def _hand_drawn(
    contour: Float[np.ndarray, "points 2"], rng: np.random.Generator
) -> Float[np.ndarray, "steps 2"]:
    """The closed contour in steps of equal length, displaced by a slowly changing drift."""
    closed = np.concatenate([contour, contour[:1]])
    lengths = np.hypot(*np.diff(closed, axis=0).T)
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    count = max(8, round(ends[-1] / _STROKE_STEP))
    # Keep the corners among the points, so that a triangle keeps its tips.
    at = np.union1d(np.linspace(0, ends[-1], count, endpoint=False), ends[:-1])
    points = np.stack([np.interp(at, ends, closed[:, axis]) for axis in (0, 1)], axis=1)
    knots = max(4, round(ends[-1] / _DRIFT_LENGTH))
    drift = rng.normal(0, _JITTER, (knots, 2))
    places = at / ends[-1] * knots
    moved = [np.interp(places, range(knots), axis, period=knots) for axis in drift.T]
    return np.asarray(points + np.stack(moved, axis=1))


def _with_gaps(
    stroke: Float[np.ndarray, "steps 2"], rng: np.random.Generator
) -> list[Float[np.ndarray, "part 2"]]:
    """The closed stroke, cut into parts by random gaps."""
    closed = np.concatenate([stroke, stroke[:1]])
    ends = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    drawn = np.ones(len(closed) - 1, bool)
    for _ in range(rng.poisson(ends[-1] / _GAP_EVERY)):
        start, length = rng.uniform(0, ends[-1]), rng.uniform(*_GAP_LENGTH)
        drawn &= (ends[:-1] < start) | (ends[:-1] >= start + length)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], drawn, [False]]).astype(np.int8)))
    return [closed[first : last + 1] for first, last in edges.reshape(-1, 2)]


def _fixed_point(points: Float[np.ndarray, "points 2"]) -> np.ndarray:
    """OpenCV's fixed-point coordinates; its integers are pixel centers, ours are pixel corners."""
    return np.asarray(np.rint((points - 0.5) * (1 << _FIXED_POINT_BITS)), np.int32)
