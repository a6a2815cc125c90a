"""From a scene to pixels: the image, and which pixels each object shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from nexus_adapters.scenes.scene import SIZE, Scene, SceneObject
from nexus_adapters.scenes.shapes import outline
from nexus_adapters.scenes.vocabulary import COLORS

PATTERN_PERIOD = 13.0  # pixels; wide enough to survive an autoencoder that shrinks eight times
_SECOND_TONE = 0.45  # the pattern's dark tone, as a share of the color
_SUPERSAMPLING = 4  # sub-pixels a side
_FIXED_POINT_BITS = 4  # of OpenCV's polygon coordinates

_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # pixel centers


@dataclass(frozen=True)
class Rendering:
    """`image`: 8-bit sRGB. `visible`: the share of each pixel that each object shows, farthest first."""

    image: UInt8[np.ndarray, "h w 3"]
    visible: Float[np.ndarray, "objects h w"]

    @property
    def background_visible(self) -> Float[np.ndarray, "h w"]:
        """The share of each pixel that no object covers, in [0, 1]."""
        return np.asarray(1 - self.visible.sum(axis=0), np.float32)


def render(scene: Scene) -> Rendering:
    """Paint the scene from back to front, anti-aliased, 128x128."""
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
    """The background alone, in [0, 1]: its color, brighter toward the light."""
    toward = math.cos(scene.light_angle) * _COLUMNS + math.sin(scene.light_angle) * _ROWS
    ramp = (toward - toward.mean()) / (SIZE / 2)
    brightness = 0.92 + scene.light_strength * ramp
    pixels = np.clip(brightness[..., None] * color_tone(scene.background), 0, 1)
    return np.asarray(pixels, np.float32)


def color_tone(color: str) -> Float[np.ndarray, "3"]:
    """The sRGB value of a color word, in [0, 1]."""
    return np.asarray(COLORS[color], np.float32) / 255


def material_pixels(
    item: SceneObject,
    color: str,
    material: str,
    rows: Float[np.ndarray, "..."],
    columns: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "... 3"]:
    """What `item` would show at these pixel centers if it were of this color and material, in [0, 1]."""
    return np.asarray(color_tone(color) * material_shade(item, material, rows, columns)[..., None])


def material_shade(
    item: SceneObject, material: str, rows: Float[np.ndarray, "..."], columns: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """The share of the color's tone that the material lets through at these pixel centers, in [0.45, 1]."""
    return 1 - (1 - _SECOND_TONE) * material_pattern(item, material, rows, columns)


def material_pattern(
    item: SceneObject, material: str, rows: Float[np.ndarray, "..."], columns: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Where the dark tone lies, in [0, 1]: fixed to the object and turning with it, its scale in pixels."""
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
    """A triangle wave of slope 1: the signed distance, in pixels, into the half period that holds x = 0."""
    period = np.float32(PATTERN_PERIOD)
    return period / 4 - np.abs(x - period * np.rint(x / period))


def covered_pixels(item: SceneObject) -> Float[np.ndarray, "h w"]:
    """The share of each pixel that the object covers, in [0, 1], whatever lies in front of it."""
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
    # OpenCV puts whole coordinates at pixel centers, we put them at pixel corners: half a sub-pixel apart.
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
