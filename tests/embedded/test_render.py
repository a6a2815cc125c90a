import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nexus_adapters.embedded.render import (
    PATTERN_PERIOD,
    background_pixels,
    color_tone,
    covered_pixels,
    material_pattern,
    material_pixels,
    outline,
    render,
)
from nexus_adapters.embedded.scene import MATERIALS, SHAPES, SIZE, Scene, SceneObject, draw_scene

PINNED = sorted((Path(__file__).parent / "pinned").glob("*.png"))
CENTERS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def thing(shape="circle", color="red", material="plain", x=64.0, y=64.0, radius=30.0, rotation=0.0):
    return SceneObject(shape, color, material, x, y, radius, rotation)


def scene_of(*items, background="blue", light_strength=0.1):
    return Scene(items, background, light_angle=0.0, light_strength=light_strength)


@pytest.fixture(scope="module")
def rendered():
    """60 scenes, as (scene, rendering)."""
    return render_all(range(60))


def render_all(seeds):
    scenes = [draw_scene(seed, "novel" if seed % 5 == 0 else "train") for seed in seeds]
    return [(scene, render(scene)) for scene in scenes]


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.stem)
def test_scenes_never_change_silently(path):
    """Weights are trained on these images, and results reported on them.

    Compared with stored images rather than by a hash: another version or processor may round the last bit of
    a cosine or a float32 product differently, which changes a value by one, or one of 16 sub-pixels.
    """
    split, seed = path.stem.split("-")
    expected = np.asarray(Image.open(path), np.int16)
    difference = np.abs(render(draw_scene(int(seed), split)).image.astype(np.int16) - expected)
    assert difference.mean() < 0.02
    assert (difference > 1).mean() < 0.001


def test_images_are_pinned():
    assert {path.stem.split("-")[0] for path in PINNED} == {"train", "test", "novel"}


def test_images_are_8_bit_and_repeat_exactly(rendered):
    for scene, rendering in rendered[:20]:
        assert rendering.image.shape == (SIZE, SIZE, 3)
        assert rendering.image.dtype == np.uint8
        assert np.array_equal(rendering.image, render(scene).image)


def test_visible_shares_are_parts_of_a_whole(rendered):
    for scene, rendering in rendered:
        visible = rendering.visible
        assert visible.shape == (len(scene.objects), SIZE, SIZE)
        assert visible.dtype == np.float32
        assert visible.min() >= 0
        assert visible.sum(axis=0).max() <= 1 + 1e-6
        assert np.allclose(rendering.background_visible + visible.sum(axis=0), 1, atol=1e-6)


def test_every_object_and_the_background_stay_visible(rendered):
    check_all_visible(rendered)


@pytest.mark.full
def test_every_object_and_the_background_stay_visible_in_500_scenes():
    check_all_visible(render_all(range(500)))


def check_all_visible(rendered):
    for _, rendering in rendered:
        assert (rendering.visible > 0.99).sum(axis=(1, 2)).min() >= 200
        assert (rendering.background_visible > 0.99).sum() >= 5000


@pytest.mark.parametrize("shape", SHAPES)
def test_covers_the_outlines_area_about_its_center(shape):
    """OpenCV fills every sub-pixel that an outline touches, so shapes come out up to a sub-pixel larger."""
    covered = covered_pixels(thing(shape, x=61.3, y=66.8, rotation=0.4))
    contours = [contour @ turned(0.4) * 30 + (61.3, 66.8) for contour in outline(shape)]
    first, *holes = [shoelace(contour) for contour in contours]
    area = first[0] - sum(hole[0] for hole in holes)
    moments = first[1] - sum(hole[1] for hole in holes)
    sides = sum(np.hypot(*(contour - np.roll(contour, 1, axis=0)).T).sum() for contour in contours)
    assert area - 1 < covered.sum() < area + sides / 4
    center = [float((CENTERS[axis] * covered).sum() / covered.sum()) for axis in (1, 0)]
    assert center == pytest.approx((moments / area).tolist(), abs=0.15)


def turned(angle):
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def shoelace(contour):
    """(area, area times centroid) of a polygon."""
    after = np.roll(contour, -1, axis=0)
    cross = contour[:, 0] * after[:, 1] - after[:, 0] * contour[:, 1]
    area = cross.sum() / 2
    moments = ((contour + after) * cross[:, None]).sum(axis=0) / 6
    return abs(area), moments * np.sign(area)


def test_outlines_are_anti_aliased():
    """A pixel shows of each color what is covered by it, and only a band of a pixel's width is mixed."""
    left_half = thing("square", x=20.4, y=64.0, radius=30 * math.sqrt(2))  # its right side at x = 50.4
    rendering = render(scene_of(left_half, light_strength=0.0))
    inside, edge, outside = (rendering.image[64, column].astype(float) for column in (49, 50, 51))
    before, share, behind = rendering.visible[0, 64, 49:52].tolist()
    assert (before, behind) == (1, 0)
    assert 0.4 <= share <= 0.4 + 1 / 4 + 0.01
    assert np.abs(edge - (share * inside + (1 - share) * outside)).max() <= 1
    circle = covered_pixels(thing())
    mixed = ((circle > 0) & (circle < 1)).sum()
    assert 2 * math.pi * 0.92 * 30 * 0.8 < mixed < 2 * math.pi * 0.92 * 30 * 1.5


def test_later_objects_hide_earlier_ones():
    far, near = thing(color="red", x=50.0), thing("ring", "yellow", x=70.0)
    overlap = (covered_pixels(far) == 1) & (covered_pixels(near) == 1)
    assert overlap.sum() > 100
    for front, order in (("yellow", (far, near)), ("red", (near, far))):
        rendering = render(scene_of(*order))
        assert np.abs(rendering.image[overlap] - color_tone(front) * 255).max() <= 1
        assert rendering.visible[0][overlap].max() == 0
        assert rendering.visible[1][overlap].min() == 1


def test_the_ground_shows_through_a_ring():
    rendering = render(scene_of(thing("ring")))
    assert rendering.background_visible[64, 64] == 1
    assert rendering.visible[0, 64, 64 + 23] == 1


@pytest.mark.parametrize(("angle", "brighter"), [(0, (64, 120)), (math.pi / 2, (120, 64))])
def test_the_background_is_brighter_toward_the_light(angle, brighter):
    pixels = background_pixels(Scene((), "green", light_angle=angle, light_strength=0.2))
    tone = color_tone("green")
    row, column = brighter
    assert (pixels[row, column] > pixels[64, 64]).all()
    assert (pixels[127 - row, 127 - column] < pixels[64, 64]).all()
    factors = pixels / tone
    assert factors.min() == pytest.approx(0.92 - 0.2, abs=0.01)
    assert factors.max() == pytest.approx(0.92 + 0.2, abs=0.01)
    assert np.ptp(factors, axis=2).max() < 1e-3  # one brightness for all channels


@pytest.mark.parametrize("material", MATERIALS)
def test_materials_have_two_tones_of_their_color(material):
    pixels = material_pixels(thing(), "cyan", material, *CENTERS)
    tone = color_tone("cyan")
    share = pixels / tone
    assert np.ptp(share, axis=2).max() < 1e-5
    assert share.max() == pytest.approx(1)
    assert share.min() == pytest.approx(1 if material == "plain" else 0.45, abs=1e-4)


@pytest.mark.parametrize(
    ("material", "dark"), [("plain", 0), ("striped", 0.5), ("checked", 0.5), ("dotted", 0.36)]
)
def test_how_much_of_a_material_is_dark(material, dark):
    assert material_pattern(thing(), material, *CENTERS).mean() == pytest.approx(dark, abs=0.03)


@pytest.mark.parametrize("material", MATERIALS[1:])
def test_patterns_repeat_turn_and_move_with_their_object(material):
    item, moved = thing(material=material), thing(material=material, x=57.0, y=69.0, rotation=0.7)
    along = np.array([3.0, 11.0, -20.0], np.float32)
    across = np.array([8.0, 0.5, 7.0], np.float32)
    seen = material_pattern(item, material, 64 + across, 64 + along)
    assert np.allclose(
        seen, material_pattern(item, material, 64 + across + PATTERN_PERIOD, 64 + along), atol=1e-4
    )
    cos, sin = math.cos(0.7), math.sin(0.7)
    rows, columns = 69 + sin * along + cos * across, 57 + cos * along - sin * across
    assert np.allclose(seen, material_pattern(moved, material, rows, columns), atol=1e-4)
    assert len(np.unique(material_pattern(item, material, *CENTERS).round())) == 2


# Outlines


def lens(r, d):
    """The area common to a circle of radius 1 and one of radius `r` whose centers are `d` apart."""
    first = math.acos((d * d + 1 - r * r) / (2 * d))
    second = r * r * math.acos((d * d + r * r - 1) / (2 * d * r))
    return first + second - 0.5 * math.sqrt((1 - d + r) * (1 + d - r) * (d + r - 1) * (d + r + 1))


OUTLINE_AREAS = {
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
def test_an_outlines_area(shape):
    first, *holes = [shoelace(contour)[0] for contour in outline(shape)]
    assert first - sum(holes) == pytest.approx(
        OUTLINE_AREAS[shape], rel=0.01
    )  # curves are polygons of short sides


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_stays_within_the_frame_around_its_center(shape):
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
