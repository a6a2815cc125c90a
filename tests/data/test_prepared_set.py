import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import encoded, picture
from tests.prepare.sets import make
from tests.refusals import refused

from nexus_adapters.conditions import Extractor, extract, register_condition
from nexus_adapters.data import prepared_set
from nexus_adapters.data.conditioned import fit_sample
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.prepared_set import is_prepared, open_prepared
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.files import file_sha256
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
    with refused("folder", "5 bytes", expected=f"'{copy / '00001.tar'}' with "):
        open_prepared(copy, "canny", tmp_path)
    (copy / "00001.tar").unlink()
    with refused("folder", "no such file", expected=f"'{copy / '00001.tar'}' with "):
        open_prepared(copy, "canny", tmp_path)
    (copy / "index.json").write_text("{}")
    with refused("folder", f"'{copy / 'index.json'}' ('conditions' is missing)"):
        open_prepared(copy, "canny", tmp_path)


def fitted_to(source, geometry):
    return [fit_sample(source, index, geometry, "canny", {}) for index in range(len(source))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Of several sizes and aspects, larger and smaller than what they are fitted to."""
    folder = tmp_path_factory.mktemp("photos")
    for index, size in enumerate([(200, 100), (90, 160), (64, 64), (48, 40), (131, 97)]):
        (folder / f"{index}.png").write_bytes(encoded(picture(index, *size)))
        (folder / f"{index}.txt").write_text("a picture")
    return folder


@pytest.mark.parametrize("geometry", [Geometry(64, 64), Geometry(96, 64), Geometry.bucketed(64, step=16)])
@pytest.mark.parametrize("is_fitted", [True, False])
def test_sdxl_reads_the_same_sizes_as_of_the_raw_folder(photos, tmp_path, geometry, is_fitted):
    plan = Plan(FolderSource(photos), {"canny": {}}, geometry if is_fitted else None, image_format="png")
    make(plan, tmp_path / "set")
    prepared = open_prepared(tmp_path / "set", "canny", tmp_path / "index")
    raw = fitted_to(FolderSource(photos), geometry)
    assert len({sample.time_ids for sample in raw}) == 5
    assert [sample.time_ids for sample in fitted_to(prepared, geometry)] == [s.time_ids for s in raw]


def test_a_set_read_at_another_size_states_the_same_crop_within_a_pixel(photos, tmp_path):
    make(Plan(FolderSource(photos), {"canny": {}}, Geometry(64, 64)), tmp_path / "set")
    prepared = open_prepared(tmp_path / "set", "canny", tmp_path / "index")
    for side in (32, 48, 128):
        found, raw = (
            fitted_to(prepared, Geometry(side, side)),
            fitted_to(FolderSource(photos), Geometry(side, side)),
        )
        off = np.abs(np.array([s.time_ids for s in found]) - [s.time_ids for s in raw])
        assert off.max() <= max(1, side / 64), off  # a pixel of the set or of what is read


def rewritten(folder, out, change):
    """A copy of a set whose JSON is changed in every sample."""
    out.mkdir()
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        with tarfile.open(folder / shard["file"]) as old, tarfile.open(out / shard["file"], "w") as new:
            for member in old:
                content = old.extractfile(member).read()
                if member.name.endswith(".json"):
                    content = change(content)
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        content = (out / shard["file"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize("size", [None, [0, 5], "128x128", [1.5, 2], [128]])
def test_sets_that_state_no_size_are_reported_once_and_read(prepared, tmp_path, size):
    def change(content):
        about = json.loads(content) | {"original_size": size}
        return json.dumps(about).encode()

    copy = rewritten(prepared, tmp_path / "copy", change)
    with pytest.warns(UserWarning, match="original_size") as caught:
        source = open_prepared(copy, "canny", tmp_path)
    samples = fitted_to(source, Geometry(64, 64))
    assert len(caught) == 1
    assert {sample.time_ids[:4] for sample in samples} == {(128.0, 128.0, 0.0, 0.0)}


def test_the_original_size_is_part_of_a_samples_content(prepared, tmp_path):
    copy = rewritten(prepared, tmp_path / "copy", lambda text: text.replace(b"[128, 128]", b"[128, 200]"))
    one, other = (open_prepared(folder, "canny", tmp_path) for folder in (prepared, copy))
    assert one.content_hash(0) != other.content_hash(0)
    assert other.load(0).original_size == (128, 200)


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
        with refused("folder", expected=f"'{copied / '00001.tar'}' with SHA-256"):
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
