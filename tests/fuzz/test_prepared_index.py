"""The index of a prepared set, changed at random: a set that can be read, or one error that names what."""

import json
import random
import shutil

import pytest
from tests.fuzz.test_recipes import mutated, one_error, places
from tests.prepare.sets import make

from nexus_adapters.conditions import find_extractor
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.prepared_set import INDEX, geometry_of, open_prepared, options_of
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.training.config import DataOptions

READ = (
    "conditions",
    "image_format",
    "shards",
    "settings.conditions",
    "settings.geometry",
)  # the rest is kept


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    geometry = Geometry.bucketed(64, step=32)
    make(Plan(SceneSource(3), {"canny": {"low": 40}, "sketch": {}}, geometry, shard_size=2), out)
    return out


def check(folder, kept, content):
    """Every reader of the index gives a value, or one error; all agree whether it is an index."""
    (folder / INDEX).write_text(json.dumps(content))
    geometry = one_error(geometry_of, folder)
    assert geometry is None or geometry.width > 0
    options = one_error(options_of, folder, "canny")
    assert options is None or isinstance(options, dict)
    source = one_error(open_prepared, folder, "canny", kept)
    assert source is None or (options is not None and source.load(0).condition is not None)
    data = one_error(DataOptions, "prepared", str(folder))
    assert data is None or 0 < data.resolution <= 2**14


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.full)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_any_index_is_one_that_can_be_read_or_one_error(prepared, tmp_path, seeds):
    folder = shutil.copytree(prepared, tmp_path / "set")
    content = json.loads((folder / INDEX).read_text())
    for seed in seeds:
        try:
            check(folder, tmp_path / "kept", mutated(content, random.Random(seed)))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_no_value_that_is_read_may_have_another_type(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "set")
    for *above, key in places(json.loads((folder / INDEX).read_text())):
        name = ".".join(map(str, [*above, key]))
        depth = (
            3 if name.startswith("settings.conditions") else 9
        )  # what options are is for extractors to say
        if not name.startswith(READ) or len(above) >= depth or name.endswith("samples"):
            continue
        for value in (7.5, True, [[]], "\ud800", {"a": 1}):
            if isinstance(value, dict) and depth == 3 and len(above) == 2:
                continue  # as options should be
            content = json.loads((prepared / INDEX).read_text())
            table = content
            for part in above:
                table = table[part]
            table[key] = value
            (folder / INDEX).write_text(json.dumps(content))
            with pytest.raises(InvalidArgument) as caught:
                open_prepared(folder, "canny", tmp_path / "kept")
            assert caught.value.name in ("folder", "condition_name"), name


def test_options_are_those_that_the_maps_were_made_with(prepared):
    assert options_of(prepared, "canny") == find_extractor("canny").defaults() | {"low": 40}
    with pytest.raises(InvalidArgument) as caught:
        options_of(prepared, "depth")
    assert (caught.value.name, caught.value.received) == ("condition_name", "'depth'")
    assert geometry_of(prepared) == Geometry.bucketed(64, step=32)
