import numpy as np
import pytest
from PIL import Image
from tests.prepare.sets import make
from tests.refusals import refused

from nexus_adapters.conditions import Extractor, extract, register_condition
from nexus_adapters.data.conditioned import fit_sample
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.prepared_set import is_prepared, open_prepared
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.metrics.structure import edge_f1
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


def test_gray_labels_of_an_extractor_are_no_ids(tmp_path):
    gray = Extractor("gray", lambda image: Image.new("RGB", image.size, (120, 120, 120)), "", kind="labels")
    register_condition(gray)
    make(Plan(SceneSource(2), {"gray": {}}), tmp_path / "set")
    source = open_prepared(tmp_path / "set", "gray", tmp_path)
    sample = fit_sample(source, 0, Geometry(64, 64), "gray", {})
    assert set(np.unique(sample.condition)) == {120}


def test_a_set_keeps_its_lines_at_another_size(tmp_path):
    """A set of 512 pixels that is read at 128 has the edges that images of 128 have."""
    large = [
        SceneSource(4).load(index).image.resize((512, 512), Image.Resampling.LANCZOS) for index in range(4)
    ]
    for index, image in enumerate(large):
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a scene")
    make(Plan(FolderSource(tmp_path), {"canny": {}}, image_format="png"), tmp_path / "set")
    source = open_prepared(tmp_path / "set", "canny", tmp_path / "index")
    for index in range(4):
        sample = fit_sample(source, index, Geometry(128, 128), "canny", {})
        lines, expected = (np.asarray(each)[..., 0] > 127 for each in (
            sample.condition, extract("canny", sample.image)))  # fmt: skip
        assert edge_f1(lines, expected) > 0.9
        assert set(np.unique(sample.condition)) == {0, 255}


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
