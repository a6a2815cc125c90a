import math
from dataclasses import astuple, replace
from random import Random

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.embedded.held_out import (
    SCENE_METRICS,
    SceneScore,
    best_fit,
    load_test_scenes,
    score,
    score_images,
)
from nexus_adapters.embedded.maps import MAPS, draw_map
from nexus_adapters.embedded.render import material_pixels, render
from nexus_adapters.embedded.scene import COLORS, MATERIALS, SIZE, draw_scene

PERFECT = SceneScore(1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def test_scenes():
    """60, as (scene, rendering)."""
    scenes = [draw_scene(seed, "test") for seed in range(60)]
    return [(scene, render(scene)) for scene in scenes]


def means(scores):
    return np.mean([astuple(result) for result in scores], axis=0)


def test_true_renderings_score_full(test_scenes):
    assert means([score(r.image, scene, r) for scene, r in test_scenes]).min() >= 0.99


def test_novel_combinations_score_full_too():
    scenes = [draw_scene(seed, "novel") for seed in range(15)]
    assert means([score(render(scene).image, scene) for scene in scenes]).min() >= 0.99


def test_noise_and_blur_do_not_deceive(test_scenes):
    rng = np.random.default_rng(0)
    noisy = []
    for scene, rendering in test_scenes[:20]:
        smooth = rendering.image.astype(np.float32)
        smooth = (smooth + np.roll(smooth, 1, 0) + np.roll(smooth, 1, 1)) / 3
        image = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
        noisy.append(score(image, scene, rendering))
    assert means(noisy).min() >= 0.98


def test_shuffled_attributes_score_chance(test_scenes):
    """A scene's image against random words is right by chance, within a binomial interval."""
    rng = Random(0)
    found, objects = np.zeros(3), 0
    for scene, rendering in test_scenes:
        items = tuple(
            replace(item, color=rng.choice(tuple(COLORS)), material=rng.choice(MATERIALS))
            for item in scene.objects
        )
        other = replace(scene, objects=items, background=rng.choice(tuple(COLORS)))
        result = score(rendering.image, other, rendering)
        found += np.array([result.binding_color, result.binding_material, 0]) * len(items)
        found[2] += result.background
        objects += len(items)
    for right, trials, chance in zip(
        found, (objects, objects, len(test_scenes)), (1 / 8, 1 / 4, 1 / 8), strict=True
    ):
        assert abs(right - trials * chance) < 3 * math.sqrt(trials * chance * (1 - chance))


def others(words, word):
    return [other for other in words if other != word]


def test_one_wrong_object_is_found(test_scenes):
    for index, (scene, rendering) in enumerate(test_scenes[:12]):
        wrong = index % len(scene.objects)
        share = 1 - 1 / len(scene.objects)
        for field, words, expected in (
            ("color", COLORS, (share, 1.0, 1.0)),
            ("material", MATERIALS, (1.0, share, 1.0)),
        ):
            item = scene.objects[wrong]
            word = Random(index).choice(others(words, getattr(item, field)))
            items = list(scene.objects)
            items[wrong] = replace(item, **{field: word})
            painted = render(replace(scene, objects=tuple(items))).image
            assert astuple(score(painted, scene, rendering)) == pytest.approx(expected)


def test_a_wrong_background_is_found(test_scenes):
    for index, (scene, rendering) in enumerate(test_scenes[:12]):
        ground = Random(index).choice(others(COLORS, scene.background))
        painted = render(replace(scene, background=ground)).image
        assert score(painted, scene, rendering) == replace(PERFECT, background=0.0)


def test_a_black_image_shows_the_darkest_color_everywhere():
    darkest = min(COLORS, key=lambda color: np.linalg.norm(COLORS[color]))
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    for seed in range(10):
        scene = draw_scene(seed, "test")
        result = score(black, scene)
        assert result.background == float(scene.background == darkest)
        assert result.binding_color == np.mean([item.color == darkest for item in scene.objects])


def test_rendering_anew_changes_nothing(test_scenes):
    scene, rendering = test_scenes[0]
    assert score(rendering.image, scene) == score(rendering.image, scene, rendering)


def test_best_fit_is_the_least_squared_error(test_scenes):
    """Compared with all 32 candidates, in images that show something else."""
    rng = np.random.default_rng(1)
    fits = set()
    for scene, rendering in test_scenes[:25]:
        item, visible = scene.objects[0], rendering.visible[0]
        pixels = rng.random((SIZE, SIZE, 3)).astype(np.float32) * rng.random(3).astype(np.float32)
        region = visible > 0.99
        centers = [axis[region] for axis in np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5]
        errors = {
            (color, material): np.square(
                material_pixels(item, color, material, *centers) - pixels[region]
            ).sum(dtype=np.float64)
            for color in COLORS
            for material in MATERIALS
        }
        fits.add(best_fit(pixels, item, visible))
        assert best_fit(pixels, item, visible) == min(errors, key=lambda candidate: errors[candidate])
    assert len(fits) > 3


@pytest.mark.parametrize("shape", [(64, 64, 3), (128, 128, 4), (128, 128)])
def test_another_shape_is_named(shape):
    with refused("image", shape, expected="(128, 128, 3)"):
        score(np.zeros(shape, np.uint8), draw_scene(0))


def test_another_range_is_named():
    with refused("image", "float32", expected="uint8"):
        score(np.zeros((SIZE, SIZE, 3), np.float32), draw_scene(0))


def test_test_scenes_are_those_of_their_split():
    loaded = load_test_scenes(3)
    assert [entry.scene for entry in loaded] == [draw_scene(seed, "test") for seed in range(3)]
    assert all(entry.condition.size == (128, 128) and entry.condition.mode == "RGB" for entry in loaded)
    assert all(item.color in entry.prompt for entry in loaded for item in entry.scene.objects)
    later = load_test_scenes(1, "novel", first_seed=2)
    assert [entry.scene for entry in later] == [draw_scene(2, "novel")]


@pytest.mark.parametrize("condition", MAPS)
def test_scenes_have_any_of_their_maps(condition):
    loaded = load_test_scenes(3, condition_name=condition)
    for entry in loaded:
        assert np.array_equal(entry.condition, draw_map(condition, entry.scene))
        assert entry.condition_name == condition
    scores = score_images([entry.rendering.image for entry in loaded], loaded)
    assert all((values == 1).all() for values in scores.values())
    with refused("condition_name", received="'edges'", expected="canny, depth"):
        load_test_scenes(1, condition_name="edges")


def test_true_renderings_score_one_and_others_less():
    scenes = load_test_scenes(6)
    images = [entry.rendering.image for entry in scenes]
    scores = score_images(images, scenes)
    assert tuple(scores) == SCENE_METRICS
    assert all(values.shape == (6,) and (values == 1).all() for values in scores.values())
    shifted = score_images(images[1:] + images[:1], scenes)
    assert all(values.mean() < 0.7 for values in shifted.values())


def test_a_blank_image_has_no_edges():
    scenes = load_test_scenes(2)
    blank = [np.full((128, 128, 3), 128, np.uint8)] * 2
    assert (score_images(blank, scenes)["edge_f1"] == 0).all()
