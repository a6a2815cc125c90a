import numpy as np
import pytest
from tests.data.prepare.sets import make

from nexus_adapters.conditions import extract
from nexus_adapters.data.prepare.plan import Plan
from nexus_adapters.data.prepared_set import open_prepared
from nexus_adapters.data.scene_source import SceneSource


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


def test_other_folders_maps_and_damaged_shards_are_refused(prepared, tmp_path):
    with pytest.raises(
        ValueError, match=r"condition: expected one of canny, sketch, as .* has; received 'depth'"
    ):
        open_prepared(prepared, "depth", tmp_path)
    with pytest.raises(
        ValueError, match=r"path: expected a set that nexus prepare has made; .* which has no index"
    ):
        open_prepared(tmp_path, "canny", tmp_path)
    (tmp_path / "begun" / ".unfinished").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"received '.*begun', which is not finished"):
        open_prepared(tmp_path / "begun", "canny", tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in prepared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "00001.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"path: expected '.*00001.tar' of \d+ bytes; received 5"):
        open_prepared(copy, "canny", tmp_path)
    (copy / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"path: expected '.*00001.tar' of \d+ bytes; received none"):
        open_prepared(copy, "canny", tmp_path)
    (copy / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"path: expected an index.json of nexus prepare; received"):
        open_prepared(copy, "canny", tmp_path)
