import numpy as np
import pytest
from tests.prepare.sets import make
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.data.prepared_set import is_prepared, open_prepared
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.prepare.plan import Plan


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    make(Plan(SceneSource(12), {"canny": {}, "sketch": {}}, shard_size=5, image_format="png"), out)
    return out


@pytest.mark.parametrize("condition", ["canny", "sketch"])
def test_image_map_and_captions_come_back(prepared, tmp_path, condition):
    source = open_prepared(prepared, condition, tmp_path)
    assert len(source) == 12
    for index in (0, 4, 5, 11):
        sample, scene = source.load(index), SceneSource(12).load(index)
        assert np.array_equal(sample.image, scene.image)
        assert np.array_equal(sample.condition, extract(condition, scene.image))
        assert sample.captions == scene.captions


def test_a_finished_set_is_recognized_by_its_index(prepared, tmp_path):
    assert is_prepared(prepared)
    assert is_prepared(str(prepared))
    assert not is_prepared(tmp_path)
    assert not is_prepared(tmp_path / "nowhere")
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)
    (tmp_path / "begun" / "00000.tar").touch()
    assert not is_prepared(tmp_path / "begun")


def test_other_folders_maps_and_damaged_shards_are_refused(prepared, tmp_path):
    with refused("condition_name", "'depth'", expected="canny, sketch"):
        open_prepared(prepared, "depth", tmp_path)
    with refused("folder", f"'{tmp_path}', which has no index.json"):
        open_prepared(tmp_path, "canny", tmp_path)
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)
    with refused("folder", f"'{tmp_path / 'begun'}', which is not finished", hint="nexus prepare"):
        open_prepared(tmp_path / "begun", "canny", tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in prepared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "00001.tar").write_bytes(b"short")
    with refused("folder", "5 bytes", expected=f"'{copy / '00001.tar'}' of "):
        open_prepared(copy, "canny", tmp_path)
    (copy / "00001.tar").unlink()
    with refused("folder", "no such file", expected=f"'{copy / '00001.tar'}' of "):
        open_prepared(copy, "canny", tmp_path)
    (copy / "index.json").write_text("{}")
    with refused("folder", f"'{copy / 'index.json'}' (it lacks 'conditions')"):
        open_prepared(copy, "canny", tmp_path)
