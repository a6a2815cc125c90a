"""The eight shapes as outlines: closed contours in a unit frame, x to the right and y down."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float

Contour = Float[np.ndarray, "points 2"]


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
    # The outer circle from horn to horn, then back along a second circle moved to the right.
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


@cache
def outline(shape: str) -> tuple[Contour, ...]:
    """The contours of `shape`, within about one unit of the origin; of two, the inner is a hole."""
    return tuple(_BUILDERS[shape]())
