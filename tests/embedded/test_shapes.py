import math

import numpy as np
import pytest

from nexus_adapters.embedded.render import outline
from nexus_adapters.embedded.scene import SHAPES


def shoelace(contour):
    x, y = contour.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def lens(r, d):
    """The area common to a circle of radius 1 and one of radius `r` whose centers are `d` apart."""
    first = math.acos((d * d + 1 - r * r) / (2 * d))
    second = r * r * math.acos((d * d + r * r - 1) / (2 * d * r))
    return first + second - 0.5 * math.sqrt((1 - d + r) * (1 + d - r) * (d + r - 1) * (d + r + 1))


AREAS = {
    "circle": math.pi * 0.92**2,
    "ring": math.pi * (1 - 0.52**2),
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 10 * 0.45 * math.sin(math.pi / 5) / 2,
    "cross": 0.64**2 + 4 * 0.64 * 0.62,
    "heart": 180 * math.pi / 16.5**2,
    "crescent": math.pi - lens(0.80, 0.48),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_area(shape):
    first, *holes = [shoelace(contour) for contour in outline(shape)]
    assert first - sum(holes) == pytest.approx(AREAS[shape], rel=0.01)  # curves are polygons of short sides


@pytest.mark.parametrize("shape", SHAPES)
def test_stays_within_the_frame_around_its_center(shape):
    distances = np.concatenate([np.hypot(*contour.T) for contour in outline(shape)])
    assert 0.9 < distances.max() < 1.15  # what the renderer cuts out around an object


def test_only_the_ring_has_a_hole():
    assert [shape for shape in SHAPES if len(outline(shape)) > 1] == ["ring"]


def test_the_heart_and_the_triangle_stand_upright():
    """y points down: the triangle's tip is up, the heart's down."""
    (triangle,), (heart,) = outline("triangle"), outline("heart")
    assert triangle[:, 1].min() == pytest.approx(-1)
    assert (triangle[:, 1] > 0).sum() == 2
    assert heart[heart[:, 1].argmax(), 0] == pytest.approx(0, abs=1e-9)


def test_the_crescent_opens_to_the_right():
    (crescent,) = outline("crescent")
    assert crescent[:, 0].min() == pytest.approx(-0.88, abs=0.01)
    assert crescent[:, 0].max() < 0.8


def test_the_star_has_five_points():
    (star,) = outline("star")
    assert (np.hypot(*star.T) > 0.9).sum() == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_no_outline_crosses_itself(shape):
    for contour in outline(shape):
        sides = list(zip(contour, np.roll(contour, -1, axis=0), strict=True))
        for first, a in enumerate(sides):
            for b in sides[first + 2 : len(sides) - (first == 0)]:
                assert not crosses(a, b)


def crosses(a, b):
    def side(line, point):
        (x, y), (u, v) = line
        return np.sign((u - x) * (point[1] - y) - (v - y) * (point[0] - x))

    return side(a, b[0]) * side(a, b[1]) < 0 and side(b, a[0]) * side(b, a[1]) < 0
