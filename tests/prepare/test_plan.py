import sys

import pytest
from jaxtyping import config
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.data.crop import Geometry
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import MISSING
from nexus_adapters.prepare.filters import Filters
from nexus_adapters.prepare.plan import Plan

CANNY = {"canny": {}}


def test_shards_cover_the_source():
    plan = Plan(SceneSource(25), CANNY, shard_size=10)
    assert plan.shards == 3
    assert [list(plan.indices(shard)) for shard in range(3)] == [
        list(range(10)), list(range(10, 20)), list(range(20, 25)),
    ]  # fmt: skip
    assert len(Plan(SceneSource(25), CANNY, count=7)) == 7
    assert len(Plan(SceneSource(25), CANNY, count=70)) == 25


def test_every_setting_that_decides_bytes_is_told(tmp_path):
    plain = Plan(SceneSource(25), CANNY).settings()
    assert Plan(SceneSource(25), {"canny": {"low": 100}}).settings() == plain  # what a default says, too
    changed = [
        Plan(SceneSource(24), CANNY),
        Plan(SceneSource(25, first_seed=1), CANNY),
        Plan(SceneSource(25), {"canny": {"low": 50}}),
        Plan(SceneSource(25), {"canny": {}, "sketch": {}}),
        Plan(SceneSource(25), CANNY, Geometry(64, 64)),
        Plan(SceneSource(25), CANNY, Geometry.bucketed(64, 16)),
        Plan(SceneSource(25), CANNY, captions="first"),
        Plan(SceneSource(25), CANNY, filters=Filters(min_side=4)),
        Plan(SceneSource(25), CANNY, filters=Filters(near_duplicates=0)),
        Plan(SceneSource(25), CANNY, image_format="png"),
        Plan(SceneSource(25), CANNY, shard_size=10),
        Plan(SceneSource(25), CANNY, batch_size=2),
        Plan(SceneSource(25), CANNY, seed=1),
        Plan(SceneSource(25), CANNY, count=3),
        Plan(SceneSource(25), CANNY, source_settings={"caption_column": "long"}),
    ]
    told = [str(plan.settings()) for plan in changed]
    assert len({str(plain), *told}) == len(changed) + 1


def test_a_models_weights_count_and_not_only_its_folder(tmp_path):
    model = tiny_models.segformer(tmp_path / "model")
    plan = Plan(SceneSource(2), {"segmentation": {"model": model}})
    before = plan.settings()
    assert plan.settings() == before
    tiny_models.segformer(tmp_path / "model", classes=133)
    assert plan.settings()["models"] != before["models"]


def test_near_duplicates_need_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    Plan(SceneSource(2), CANNY)
    with refused("the package imagehash", MISSING, hint="pip install imagehash"):
        Plan(SceneSource(2), CANNY, filters=Filters(near_duplicates=4))


def test_captions_are_chosen_by_seed_and_sample():
    captions = ("a", "b", "c")
    assert Plan(SceneSource(2), CANNY).choose(captions, 0) == captions
    assert Plan(SceneSource(2), CANNY, captions="first").choose(captions, 1) == ("a",)
    random = Plan(SceneSource(2), CANNY, captions="random")
    drawn = [random.choose(captions, index)[0] for index in range(300)]
    assert drawn == [random.choose(captions, index)[0] for index in range(300)]
    assert all(70 < drawn.count(caption) < 130 for caption in captions)
    other = Plan(SceneSource(2), CANNY, captions="random", seed=1)
    assert drawn != [other.choose(captions, index)[0] for index in range(300)]


@pytest.mark.parametrize(
    ("changes", "name", "received", "expected"),
    [
        ({"conditions": {}}, "conditions", MISSING, ""),
        ({"conditions": {"edges": {}}}, "conditions", "'edges'", "canny, depth"),
        ({"conditions": {"canny": {"low": "x"}}}, "conditions.canny.low", "'x'", "number"),
        ({"conditions": {"canny": {"sigma": 1}}}, "conditions.canny", "sigma", "low, high, auto"),
        ({"captions": "last"}, "captions", "'last'", "all, first, random"),
        ({"image_format": "gif"}, "image_format", "'gif'", "jpg, png, webp"),
        ({"shard_size": 0}, "shard_size", 0, "at least 1"),
        ({"batch_size": 0}, "batch_size", 0, "at least 1"),
        ({"seed": -1}, "seed", -1, "at least 0"),
        ({"count": -1}, "count", -1, "at least 0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes, name, received, expected, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # else beartype would be first to complain
    with refused(name, received, expected=expected):
        Plan(**{"source": SceneSource(2), "conditions": CANNY} | changes)
