import numpy as np
import pytest
import torch
from tests.refusals import refused

from nexus_adapters.evaluation.scenes import METRICS, initial_latents, load_test_scenes, score_images
from nexus_adapters.scenes.maps import MAPS, draw_map
from nexus_adapters.scenes.scene import draw_scene


def test_test_scenes_are_those_of_their_split():
    loaded = load_test_scenes(3)
    assert [entry.scene for entry in loaded] == [draw_scene(seed, "test") for seed in range(3)]
    assert all(entry.condition.size == (128, 128) and entry.condition.mode == "RGB" for entry in loaded)
    assert all(item.color in entry.prompt for entry in loaded for item in entry.scene.objects)
    later = load_test_scenes(1, "novel", first_seed=2)
    assert [entry.scene for entry in later] == [draw_scene(2, "novel")]


@pytest.mark.parametrize("condition", MAPS)
def test_scenes_come_with_any_of_their_maps(condition):
    loaded = load_test_scenes(3, condition=condition)
    for entry in loaded:
        assert np.array_equal(entry.condition, draw_map(condition, entry.scene))
        assert entry.condition_name == condition
    scores = score_images([entry.rendering.image for entry in loaded], loaded)
    assert all((values == 1).all() for values in scores.values())
    with refused("condition", received="'edges'", expected="canny, depth"):
        load_test_scenes(1, condition="edges")


def test_noise_of_a_row_depends_on_nothing_but_seed_and_row():
    few, many = initial_latents(2, (4, 8, 8), seed=0), initial_latents(5, (4, 8, 8), seed=0)
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(few, initial_latents(2, (4, 8, 8), seed=1))


def test_true_renderings_score_one_and_others_less():
    scenes = load_test_scenes(6)
    images = [entry.rendering.image for entry in scenes]
    scores = score_images(images, scenes)
    assert tuple(scores) == METRICS
    assert all(values.shape == (6,) and (values == 1).all() for values in scores.values())
    shifted = score_images(images[1:] + images[:1], scenes)
    assert all(values.mean() < 0.7 for values in shifted.values())


def test_a_blank_image_has_no_edges():
    scenes = load_test_scenes(2)
    blank = [np.full((128, 128, 3), 128, np.uint8)] * 2
    assert (score_images(blank, scenes)["edge_f1"] == 0).all()
