"""The size that data are read at: their own, unless the recipe says another."""

import json
import warnings

import pytest
from tests.prepare.sets import make
from tests.refusals import refused

from nexus_adapters.data.crop import Geometry
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.evaluation.config import EvaluationRecipe, with_defaults
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.parsing import validated
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.recipe_samples import open_samples, warn_of_many_epochs

GEOMETRIES = {
    "small": Geometry(64, 64),
    "odd": Geometry(60, 60),
    "wide": Geometry(192, 128),
    "buckets": Geometry.bucketed(128, step=64),
    "kept": None,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, geometry in GEOMETRIES.items():
        make(Plan(SceneSource(1), {"canny": {}}, geometry), root / name)
    return root


def data_of(command, **section):
    if command == "train":
        return parse_config({"output_dir": "o", "data": section}).data
    return validated(EvaluationRecipe, with_defaults({"data": section})).config.data


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("name", "side"), [("small", 64), ("odd", 60), ("wide", 128), ("buckets", 128), ("kept", 512)]
)
@pytest.mark.parametrize("kind", ["prepared", "folder"])
def test_a_prepared_set_is_read_at_its_own_size(sets, command, name, side, kind):
    assert data_of(command, kind=kind, path=str(sets / name)).resolution == side
    assert data_of(command, kind=kind, path=str(sets / name), resolution=256).resolution == 256


def test_scenes_have_128_pixels_and_other_data_get_512(tmp_path):
    assert data_of("train", kind="scenes", count=3).resolution == 128
    assert data_of("evaluate", kind="scenes").resolution == 128
    assert data_of("train", path=str(tmp_path)).resolution == 512
    assert data_of("evaluate", path=str(tmp_path)).resolution == 512


@pytest.mark.parametrize("section", [{"kind": "scenes", "count": 2}, {"path": "{sets}/small"}])
@pytest.mark.parametrize("side", [64, 128, 192])
def test_another_size_is_reported(sets, tmp_path, section, side):
    data = data_of("train", **{k: str(v).format(sets=sets) if k == "path" else v for k, v in section.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_samples(data, tmp_path, 4).fit(0).image.size == (data.resolution,) * 2
    other = data_of("train", kind=data.kind, path=data.path, count=data.count, resolution=side)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = open_samples(other, tmp_path, 4)
    assert samples.fit(0).image.size == (side, side)
    assert [("data.resolution" in str(w.message)) for w in caught] == [True] * (side != data.resolution)
    assert all(f"{data.resolution} pixels" in str(w.message) for w in caught)


def test_shapes_that_are_cropped_are_reported(sets, tmp_path):
    data = data_of("train", path=str(sets / "buckets"))
    with pytest.warns(UserWarning, match=r"data\.aspect_buckets"):
        open_samples(data, tmp_path, 4)
    data = data_of("train", path=str(sets / "buckets"), aspect_buckets=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_samples(data, tmp_path, 64).geometry == GEOMETRIES["buckets"]


def test_a_size_that_does_not_fit_the_base_is_refused_as_the_datas(sets, tmp_path):
    with refused("data.resolution", "60", hint="size of the data"):
        open_samples(data_of("train", path=str(sets / "odd")), tmp_path, 64)


@pytest.mark.parametrize("geometry", [[1], {"width": "x"}, {"width": 0, "height": 0, "buckets": []}])
def test_a_damaged_index_is_refused_as_the_datas(sets, tmp_path, geometry):
    index = json.loads((sets / "small" / "index.json").read_text())
    index["settings"]["geometry"] = geometry
    damaged = tmp_path / "set"
    damaged.mkdir()
    (damaged / "index.json").write_text(json.dumps(index))
    data = data_of("train", path=str(damaged))
    with refused("data.path", str(damaged / "index.json")):
        open_samples(data, tmp_path, 64)


@pytest.mark.parametrize(
    ("steps", "batch_size", "samples"), [(101, 1, 1), (51, 2, 1), (2001, 4, 80), (10**6, 8, 18)]
)
def test_many_epochs_are_reported(steps, batch_size, samples):
    with pytest.warns(UserWarning, match=r"^training\.max_train_steps: "):
        warn_of_many_epochs(TrainingOptions(max_train_steps=steps), batch_size, samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewer = 100 * samples // batch_size
        warn_of_many_epochs(TrainingOptions(max_train_steps=fewer), batch_size, samples)
