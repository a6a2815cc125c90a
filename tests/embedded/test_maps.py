from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tests.refusals import refused

from nexus_adapters.conditions import canny
from nexus_adapters.embedded.maps import MAPS, SHAPE_COLORS, depth_map, draw_map, segmentation_map, sketch_map
from nexus_adapters.embedded.render import covered_pixels, render
from nexus_adapters.embedded.scene import COLORS, SHAPES, SIZE, Scene, SceneObject, draw_scene

PINNED = sorted((Path(__file__).parent / "pinned" / "maps").glob("*.png"))
SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 60))]


def two_squares():
    far = SceneObject("square", "red", "plain", 50.0, 64.0, 30.0, 0.0)
    near = SceneObject("circle", "green", "plain", 78.0, 64.0, 30.0, 0.0)
    return Scene((far, near), "blue", 0.0, 0.1)


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.stem)
def test_maps_never_change_silently(path):
    """As the scenes' pictures do not: adapters are trained on these maps."""
    split, seed, condition = path.stem.split("-")
    expected = np.asarray(Image.open(path).convert("RGB"), np.int16)
    difference = np.abs(np.asarray(draw_map(condition, draw_scene(int(seed), split)), np.int16) - expected)
    assert (difference > 16).any(axis=2).sum() <= 4  # a pixel on the edge of two objects may go either way


def test_pinned_maps_are_there():
    assert {path.stem.split("-")[2] for path in PINNED} == set(MAPS) - {"canny"}  # which follows the picture


@pytest.mark.parametrize("condition", MAPS)
def test_maps_are_rgb_of_the_scenes_size_and_always_the_same(condition):
    scene = draw_scene(3)
    drawn = draw_map(condition, scene)
    assert (drawn.mode, drawn.size) == ("RGB", (SIZE, SIZE))
    assert np.array_equal(drawn, draw_map(condition, scene, render(scene)))
    assert not np.array_equal(drawn, draw_map(condition, draw_scene(4)))


def test_canny_is_the_extractors():
    scene = draw_scene(5)
    assert np.array_equal(draw_map("canny", scene), canny(Image.fromarray(render(scene).image)))


def test_an_unknown_map_lists_the_known():
    with refused("condition_name", "'dept'", expected="canny, depth, segm"):
        draw_map("dept", draw_scene(0))


def test_depth_is_bright_where_near():
    depth = depth_map(render(two_squares()))
    assert depth[64, 78].tolist() == [255] * 3  # the nearer, where both are
    assert depth[64, 66].tolist() == [255] * 3
    assert depth[64, 40].tolist() == [128] * 3
    assert depth[5, 5].tolist() == [0] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_has_a_step_for_each_object(seed):
    scene = draw_scene(seed)
    rendering = render(scene)
    depth = depth_map(rendering)
    levels = np.unique(depth)
    assert len(levels) == len(scene.objects) + 1
    assert (levels[0], levels[-1]) == (0, 255)
    assert np.ptp(np.diff(levels.astype(int))) <= 1
    # Where an object shows more than half of a pixel, the pixel has its level.
    for level, visible in zip(levels[1:], rendering.visible, strict=True):
        assert (depth[visible > 0.5] == level).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_segmentation_names_the_shape_of_what_shows(seed):
    scene = draw_scene(seed)
    rendering = render(scene)
    colors = segmentation_map(scene, rendering)
    for item, visible in zip(scene.objects, rendering.visible, strict=True):
        assert (colors[visible > 0.5] == SHAPE_COLORS[item.shape]).all()
    assert (colors[rendering.background_visible > 0.5] == 0).all()
    shown = {tuple(color) for color in colors.reshape(-1, 3)}
    assert shown == {(0, 0, 0), *(SHAPE_COLORS[item.shape] for item in scene.objects)}


def test_colors_of_classes_are_far_apart_and_say_nothing_of_the_objects_color():
    assert set(SHAPE_COLORS) == set(SHAPES)
    colors = np.array([(0, 0, 0), *SHAPE_COLORS.values()], int)
    apart = np.abs(colors[:, None] - colors[None]).max(axis=2) + 255 * np.eye(len(colors), dtype=int)
    assert apart.min() >= 127
    red, green = (Scene((SceneObject("star", c, "plain", 64.0, 64.0, 30.0, 0.0),), "blue", 0.0, 0.1)
                  for c in ("red", "green"))  # fmt: skip
    assert np.array_equal(segmentation_map(red, render(red)), segmentation_map(green, render(green)))
    assert len(COLORS) == len(SHAPES)


@pytest.mark.parametrize("seed", SEEDS)
def test_sketches_lie_near_the_contours_and_miss_little_of_them(seed):
    scene = draw_scene(seed)
    sketch = sketch_map(scene)[..., 0] > 127
    covered = [covered_pixels(item) > 0.5 for item in scene.objects]
    visible = np.zeros((SIZE, SIZE), np.uint8)
    for number, mask in enumerate(covered, start=1):
        visible[mask] = number
    kernel = np.ones((3, 3), np.uint8)
    contours = cv2.dilate(visible, kernel) != cv2.erode(visible, kernel)
    near_contours = cv2.dilate(contours.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    near_sketch = cv2.dilate(sketch.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    assert near_contours[sketch].mean() > 0.97  # a drift of three standard deviations and more is rare
    assert 0.7 < near_sketch[contours].mean() <= 1


def test_sketches_have_a_hands_jitter_and_gaps():
    turns = np.linspace(0, 1, 40)
    squares = (SceneObject("square", "red", "plain", 64.0, 64.0, 40.0, turn) for turn in turns)
    plain = [sketch_map(Scene((square,), "blue", 0.0, 0.1)) for square in squares]
    lengths = np.array([(sketch > 127).any(axis=2).sum() for sketch in plain])
    assert lengths.std() > 5  # strokes differ in their gaps
    drawn = np.asarray(plain[0])[..., 0] > 127
    rows, columns = np.nonzero(drawn)
    # A square's side that stands upright would have one column; a hand's wanders.
    left = columns[(columns < 50) & (rows > 45) & (rows < 83)]
    assert len(np.unique(left)) > 2
