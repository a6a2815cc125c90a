import json

import numpy as np
import pytest
from tests.prepare.sets import make
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.data import prepared_set
from nexus_adapters.data.prepared_set import is_prepared, open_prepared
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.files import file_sha256
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


@pytest.fixture
def copied(prepared, tmp_path):
    copy = tmp_path / "a [copy]"
    copy.mkdir()
    for file in prepared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change_index(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1] |= changes
    (folder / "index.json").write_text(json.dumps(index))


def test_shards_are_compared_with_the_hashes_of_their_index_once(copied, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(prepared_set, "file_sha256", lambda file: opened.append(file) or file_sha256(file))
    for _ in range(2):
        open_prepared(copied, "canny", tmp_path)
    assert [file.name for file in opened] == ["00000.tar", "00001.tar", "00002.tar"]
    content = bytearray((copied / "00001.tar").read_bytes())
    content[1000] ^= 1
    (copied / "00001.tar").write_bytes(content)
    for _ in range(2):
        with refused("folder", expected=f"'{copied / '00001.tar'}' of SHA-256"):
            open_prepared(copied, "canny", tmp_path)


@pytest.mark.parametrize("name", ["../00001.tar", "{outside}/00001.tar", "..\\00001.tar", "C:\\00001.tar"])
def test_shards_outside_the_folder_need_leave(copied, tmp_path, name):
    name = name.format(outside=tmp_path)
    (copied / "00001.tar").rename(tmp_path / "00001.tar")
    change_index(copied, file=name)
    with refused("folder", repr(name)[1:-1].replace("\\\\", "\\"), hint="allow_outside"):
        open_prepared(copied, "canny", tmp_path / "kept")
    if "\\" not in name:
        assert len(open_prepared(copied, "canny", tmp_path / "kept", allow_outside=True)) == 12


@pytest.mark.parametrize("change", [{"file": 3}, {"sha256": None}, {"file": None}])
def test_an_index_of_another_shape_is_refused(copied, tmp_path, change):
    change_index(copied, **change)
    with refused("folder", "index.json'", expected="an index.json"):
        open_prepared(copied, "canny", tmp_path)
