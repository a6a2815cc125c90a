"""Render scenes: the image, which pixels show each object, and the outlines of the shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from nexus_adapters.embedded.scene import COLORS, SIZE, Scene, SceneObject

Contour = Float[np.ndarray, "points 2"]

PATTERN_PERIOD = 13.0  # pixels; wide enough to survive an autoencoder with a factor of 8
_SECOND_TONE = 0.45  # the pattern's dark tone, as a fraction of the color
_SUPERSAMPLING = 4  # sub-pixels per side of a pixel
_FIXED_POINT_BITS = 4  # fractional bits of OpenCV's polygon coordinates

_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # pixel centers


@dataclass(frozen=True)
class Rendering:
    """A scene's image, and which object is visible where.

    Attributes:
        image: 8-bit sRGB image.
        visible: for each object, farthest first, the fraction of each pixel that shows it, in [0, 1].
    """

    image: UInt8[np.ndarray, "h w 3"]
    visible: Float[np.ndarray, "objects h w"]

    @property
    def background_visible(self) -> Float[np.ndarray, "h w"]:
        """The fraction of each pixel that no object covers, in [0, 1]."""
        return np.asarray(1 - self.visible.sum(axis=0), np.float32)


def render(scene: Scene) -> Rendering:
    """Render the scene from back to front, anti-aliased, at 128x128."""
    canvas = background_pixels(scene)
    visible = np.zeros((len(scene.objects), SIZE, SIZE), np.float32)
    for index, item in enumerate(scene.objects):
        box, coverage = _coverage(item)
        visible[(slice(None), *box)] *= 1 - coverage
        visible[(index, *box)] = coverage
        pixels = material_pixels(item, item.color, item.material, _ROWS[box], _COLUMNS[box])
        canvas[box] += coverage[..., None] * (pixels - canvas[box])
    return Rendering(np.rint(canvas * 255).astype(np.uint8), visible)


def background_pixels(scene: Scene) -> Float[np.ndarray, "h w 3"]:
    """Return the pixels of the background alone, in [0, 1]; it is brighter toward the light."""
    toward = math.cos(scene.light_angle) * _COLUMNS + math.sin(scene.light_angle) * _ROWS
    ramp = (toward - toward.mean()) / (SIZE / 2)
    brightness = 0.92 + scene.light_strength * ramp
    pixels = np.clip(brightness[..., None] * color_tone(scene.background), 0, 1)
    return np.asarray(pixels, np.float32)


def color_tone(color: str) -> Float[np.ndarray, "3"]:
    """Return the sRGB value of a color word, in [0, 1]."""
    return np.asarray(COLORS[color], np.float32) / 255


def material_pixels(
    item: SceneObject,
    color: str,
    material: str,
    rows: Float[np.ndarray, "..."],
    columns: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "... 3"]:
    """Return `item`'s pixels, in [0, 1], at these pixel centers if it had this color and material."""
    return np.asarray(color_tone(color) * material_shade(item, material, rows, columns)[..., None])


def material_shade(
    item: SceneObject, material: str, rows: Float[np.ndarray, "..."], columns: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Return the material's factor on the color's tone at these pixel centers, in [0.45, 1]."""
    return 1 - (1 - _SECOND_TONE) * material_pattern(item, material, rows, columns)


def material_pattern(
    item: SceneObject, material: str, rows: Float[np.ndarray, "..."], columns: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Return the fraction of the dark tone at these pixel centers, in [0, 1]. It turns with the object."""
    if material == "plain":
        return np.zeros_like(rows)
    dx, dy = columns - np.float32(item.x), rows - np.float32(item.y)
    cos, sin = np.float32(math.cos(item.rotation)), np.float32(math.sin(item.rotation))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    if material == "striped":
        return np.asarray(np.clip(0.5 + _wave(v), 0, 1))
    if material == "checked":
        sign_u, sign_v = np.clip(2 * _wave(u), -1, 1), np.clip(2 * _wave(v), -1, 1)
        return np.asarray(0.5 + 0.5 * sign_u * sign_v)
    du, dv = _wave(u) - PATTERN_PERIOD / 4, _wave(v) - PATTERN_PERIOD / 4  # to the nearest dot's center
    return np.clip(0.5 + 0.34 * PATTERN_PERIOD - np.hypot(du, dv), 0, 1)


def _wave(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """A triangle wave of slope 1: the signed distance, in pixels, into the half period around x = 0."""
    period = np.float32(PATTERN_PERIOD)
    return period / 4 - np.abs(x - period * np.rint(x / period))


def covered_pixels(item: SceneObject) -> Float[np.ndarray, "h w"]:
    """Return the fraction of each pixel that the object covers, in [0, 1], including where it is hidden."""
    covered = np.zeros((SIZE, SIZE), np.float32)
    box, covered_in_box = _coverage(item)
    covered[box] = covered_in_box
    return covered


def _coverage(item: SceneObject) -> tuple[tuple[slice, slice], Float[np.ndarray, "h w"]]:
    """The box around an object, and how much of each of its pixels the object covers."""
    top, left = (max(0, math.floor(c - item.radius * 1.15)) for c in (item.y, item.x))
    bottom, right = (min(SIZE, math.ceil(c + item.radius * 1.15)) for c in (item.y, item.x))
    cos, sin = math.cos(item.rotation), math.sin(item.rotation)
    turn = np.array([[cos, sin], [-sin, cos]]) * item.radius
    scale = _SUPERSAMPLING << _FIXED_POINT_BITS
    # Integer coordinates are pixel centers in OpenCV but pixel corners here, half a sub-pixel apart.
    shift = (1 << _FIXED_POINT_BITS) / 2
    contours = [
        np.rint((contour @ turn + [item.x - left, item.y - top]) * scale - shift).astype(np.int32)
        for contour in outline(item.shape)
    ]
    height, width = bottom - top, right - left
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(fine, contours, 255, shift=_FIXED_POINT_BITS)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return (slice(top, bottom), slice(left, right)), coverage


@cache
def outline(shape: str) -> tuple[Contour, ...]:
    """Return the contours of `shape` in units of its radius, centered on the origin; a second is a hole."""
    return tuple(_BUILDERS[shape]())


def _arc(radius: float, start_deg: float, end_deg: float, points: int) -> Contour:
    angles = np.radians(np.linspace(start_deg, end_deg, points))
    return np.asarray(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _closed_circle(radius: float) -> Contour:
    return _arc(radius, 0, 360, 65)[:-1]


def _star() -> Contour:
    radii = np.tile([1.0, 0.45], 5)
    angles = np.radians(-90 + 36 * np.arange(10))
    return np.asarray(radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _cross() -> Contour:
    arm, half = 0.94, 0.32
    quarter = np.array([[half, -arm], [half, -half], [arm, -half]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # right-multiplied: a quarter turn
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> Contour:
    t = np.linspace(0, 2 * np.pi, 65)[:-1]
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 16.5


def _crescent() -> Contour:
    # The outer circle from tip to tip, then back along a second circle, shifted to the right.
    shift, inner_radius = 0.48, 0.80
    horn_x = (1 + shift**2 - inner_radius**2) / (2 * shift)
    outer_deg = np.degrees(np.arccos(horn_x))
    inner_deg = np.degrees(np.arctan2(np.sqrt(1 - horn_x**2), horn_x - shift))
    outer = _arc(1.0, outer_deg, 360 - outer_deg, 49)
    inner = _arc(inner_radius, 360 - inner_deg, inner_deg, 37) + np.array([shift, 0.0])
    return np.asarray(np.concatenate([outer, inner]) + np.array([0.12, 0.0]))


_BUILDERS: dict[str, Callable[[], list[Contour]]] = {
    "circle": lambda: [_closed_circle(0.92)],
    "ring": lambda: [_closed_circle(1.0), _closed_circle(0.52)],
    "square": lambda: [_arc(1.0, 45, 405, 5)[:-1]],
    "triangle": lambda: [_arc(1.0, -90, 270, 4)[:-1]],
    "star": lambda: [_star()],
    "cross": lambda: [_cross()],
    "heart": lambda: [_heart()],
    "crescent": lambda: [_crescent()],
}
