import pickle

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.data.samples import Source
from nexus_adapters.embedded import scene_source
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.maps import MAPS, draw_map
from nexus_adapters.embedded.render import Rendering, render
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.embedded.scene_source import SceneSource


def test_scenes_of_the_training_split():
    source = SceneSource(5, first_seed=40)
    assert isinstance(source, Source)
    assert len(source) == 5
    sample = source.load(2)
    scene = draw_scene(42)
    assert sample.key == source.key(2) == "scene 42"
    assert np.array_equal(sample.image, render(scene).image)
    assert sample.condition is None
    assert sample.captions == tuple(caption(scene, phrasing) for phrasing in range(3))
    assert len(SceneSource(5, phrasings=1).load(0).captions) == 1
    assert source.size(2) == sample.image.size == (128, 128)


def test_hashes_follow_seed_phrasings_and_drawing(monkeypatch):
    plain = SceneSource(5).content_hash(3)
    assert SceneSource(2, first_seed=3).content_hash(0) == plain  # the same scene
    assert SceneSource(5).content_hash(2) != plain
    assert SceneSource(5, phrasings=2).content_hash(3) != plain
    source = SceneSource(5)

    def darker(scene):
        drawn = render(scene)
        return Rendering(drawn.image // 2, drawn.visible)

    monkeypatch.setattr(scene_source, "render", darker)
    assert source.content_hash(3) != plain
    monkeypatch.undo()
    monkeypatch.setattr(scene_source, "caption", lambda scene, phrasing: "a scene")
    assert SceneSource(5).content_hash(3) != plain


def test_drawing_is_hashed_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(scene_source, "render", lambda scene: drawn.append(scene) or render(scene))
    source = SceneSource(100)
    assert not drawn
    assert len({source.content_hash(index) for index in range(100)}) == 100
    assert len(drawn) < 20


def test_it_can_be_sent_to_another_process():
    source = SceneSource(5)
    other = pickle.loads(pickle.dumps(source))
    assert other.content_hash(1) == source.content_hash(1)


@pytest.mark.parametrize(
    ("given", "name", "received", "expected"),
    [
        ({"count": 0}, "count", 0, "at least 1"),
        ({"count": 1, "first_seed": -1}, "first_seed", -1, "at least 0"),
        ({"count": 1, "phrasings": 0}, "phrasings", 0, "at least 1"),
    ],
)
def test_bad_arguments(given, name, received, expected):
    with refused(name, received, expected=expected):
        SceneSource(**given)


def test_indices_outside():
    with pytest.raises(IndexError, match="index: expected 0 to 4, got 5"):
        SceneSource(5).load(5)


@pytest.mark.parametrize("condition", MAPS)
def test_samples_have_the_map_that_was_asked_for(condition):
    source = SceneSource(5, first_seed=40, condition_name=condition)
    sample = source.load(2)
    assert np.array_equal(sample.condition, draw_map(condition, draw_scene(42)))
    assert np.array_equal(sample.image, SceneSource(5, first_seed=40).load(2).image)


def test_hashes_follow_the_map():
    hashes = {SceneSource(5, 40, condition_name=name).content_hash(2) for name in (None, *MAPS)}
    assert len(hashes) == 1 + len(MAPS)


def test_an_unknown_map_lists_the_known():
    with refused("condition_name", "'edges'", expected="canny, depth, "):
        SceneSource(5, condition_name="edges")
