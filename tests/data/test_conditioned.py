import importlib
import json
import linecache
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import encoded, picture
from tests.data.tar_files import members, tar
from tests.refusals import refused

from nexus_adapters.conditions import EXTRACTORS, extract, register_condition
from nexus_adapters.data.conditioned import ConditionedSource, KnownHashes, fit_sample
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import BadSample, Sample, Source
from nexus_adapters.data.tars import TarSource
from nexus_adapters.embedded.scene_source import SceneSource

COUNT = 5


@pytest.fixture
def folder(tmp_path):
    for index in range(COUNT):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index)))
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    return tmp_path


class CountingSource(FolderSource):
    """`hashed`: the samples whose files were read for their hash."""

    def __init__(self, folder):
        super().__init__(folder)
        self.hashed = []

    def content_hash(self, index):
        self.hashed.append(index)
        return super().content_hash(index)


def hashes(folder, file, unknown=None):
    """The hashes of all samples, of which those in `unknown` have to be computed."""
    source = CountingSource(folder)
    with KnownHashes(file).kept() as known:
        found = [known.content_hash(source, index) for index in range(COUNT)]
    assert unknown is None or source.hashed == unknown
    assert found == [source.content_hash(index) for index in range(COUNT)]
    return found


def test_only_what_changed_is_hashed_again(folder, tmp_path):
    file = tmp_path / "a" / "hashes.jsonl"
    before = hashes(folder, file, unknown=list(range(COUNT)))
    assert hashes(folder, file, unknown=[]) == before
    (folder / "3.png").write_bytes(encoded(picture(99)))
    (folder / "1.txt").write_text("another")
    after = hashes(folder, file, unknown=[1, 3])
    assert [ours != theirs for ours, theirs in zip(after, before, strict=True)] == [
        index in (1, 3) for index in range(COUNT)
    ]


def test_equal_size_and_time_do_not_hide_a_change(folder, tmp_path):
    """What a copy that keeps times looks like."""
    before = hashes(folder, tmp_path / "hashes.jsonl")
    file = folder / "2.txt"
    status = file.stat()
    file.write_text("picture 9")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes(folder, tmp_path / "hashes.jsonl")[2] != before[2]


@pytest.mark.parametrize("damage", [b'["a"', b"\xff\xfe", b'{"a": 1}\n', b'["a", "short"]', b"7\n[]\n"])
def test_a_file_that_a_kill_cut_short_costs_time_alone(folder, tmp_path, damage):
    file = tmp_path / "hashes.jsonl"
    before = hashes(folder, file)
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2] + damage)
    assert hashes(folder, file) == before
    assert hashes(folder, file, unknown=[]) == before


def test_what_is_hashed_before_an_error_is_kept(folder, tmp_path):
    (folder / "4.png").unlink()
    source = CountingSource(folder)
    (folder / "3.png").unlink()
    known = KnownHashes(tmp_path / "hashes.jsonl")
    with pytest.raises(BadSample, match=r"^image: .*3\.png"), known.kept():  # noqa: PT012
        for index in range(4):
            known.content_hash(source, index)
    source.hashed.clear()
    again = KnownHashes(tmp_path / "hashes.jsonl")
    assert [again.content_hash(source, index) for index in range(3)]
    assert source.hashed == []


def test_several_may_add_to_one_file(folder, tmp_path):
    source = CountingSource(folder)
    several = [KnownHashes(tmp_path / "hashes.jsonl") for _ in range(COUNT)]
    for index, known in enumerate(several):
        with known.kept():
            known.content_hash(source, index)
    source.hashed.clear()
    known = KnownHashes(tmp_path / "hashes.jsonl")
    assert [known.content_hash(source, index) for index in range(COUNT)]
    assert source.hashed == []


def test_what_has_no_stamp_is_hashed_every_time(tmp_path):
    source = SceneSource(2)
    with KnownHashes(tmp_path / "hashes.jsonl").kept() as known:
        assert known.content_hash(source, 1) == source.content_hash(1)
    assert not (tmp_path / "hashes.jsonl").exists()


class OneSample:
    """A source of one sample."""

    def __init__(self, image, condition=None):
        self.sample = Sample("the sample", image, condition, ("a", "b"))

    def __len__(self):
        return 1

    def key(self, index):
        return self.sample.key

    def content_hash(self, index):
        return ""

    def image_hash(self, index):
        return ""

    def stamp(self, index):
        return None

    def size(self, index):
        return self.sample.image.size

    def load(self, index):
        return self.sample


def test_a_missing_map_is_drawn_from_the_fitted_image():
    geometry = Geometry(96, 64)
    sample = fit_sample(SceneSource(3), 1, geometry, "canny", {"low": 400, "high": 900})
    scene = SceneSource(3).load(1)
    fitted = geometry.fit(scene.image, (96, 64))
    assert np.array_equal(sample.image, fitted)
    assert np.array_equal(sample.condition, extract("canny", fitted, low=400, high=900))
    assert not np.array_equal(sample.condition, extract("canny", fitted))
    assert (sample.key, sample.captions) == ("scene 1", scene.captions)


def test_sdxl_is_told_of_size_and_crop():
    image = picture(0, 300, 100)
    sample = fit_sample(OneSample(image), 0, Geometry(64, 64), "canny", {})
    assert sample.original_size == (100, 300)
    assert sample.crop_top_left == (0, 64)
    assert sample.time_ids == (100.0, 300.0, 0.0, 64.0, 64.0, 64.0)
    assert all(isinstance(number, float) for number in sample.time_ids)


def test_buckets_give_the_nearest_shape():
    geometry = Geometry.bucketed(128, step=32)
    for size in [(300, 300), (300, 200), (200, 300)]:
        sample = fit_sample(OneSample(picture(0, *size)), 0, geometry, "canny", {})
        assert sample.image.size == sample.condition.size == geometry.target(size)


def framed(width, height):
    """A picture whose left half is black and whose upper half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :, 0] = 255
    pixels[: height // 2, :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("scale", [0.5, 1, 2, 3])
def test_a_map_of_another_size_shows_the_same_part(scale):
    image = framed(200, 100)
    condition = framed(int(200 * scale), int(100 * scale))
    sample = fit_sample(OneSample(image, condition), 0, Geometry(40, 40), "canny", {})
    assert sample.condition.size == (40, 40)
    difference = np.abs(np.asarray(sample.image, int) - np.asarray(sample.condition, int))
    assert np.median(difference) == 0
    assert (difference.max(axis=2) > 60).sum() <= 2 * 40 * 2  # at most two pixels beside either edge


def test_a_given_map_needs_no_extractor():
    condition = Image.new("RGB", (24, 16), (100, 2, 3))
    sample = fit_sample(OneSample(picture(), condition), 0, Geometry(24, 16), "no such extractor", {})
    assert np.array_equal(sample.condition, condition)


def test_labels_are_not_mixed():
    labels = framed(37, 37)
    for name, is_mixed in [("depth", True), ("segmentation", False), ("another", False)]:
        sample = fit_sample(OneSample(picture(0, 37, 37), labels), 0, Geometry(16, 16), name, {})
        assert (set(np.unique(sample.condition)) - {0, 255} != set()) == is_mixed


def test_given_maps_are_read_by_the_kind_of_their_condition():
    def fitted(condition, name, **options):
        sample = OneSample(picture(0, 16, 16), condition)
        return np.asarray(fit_sample(sample, 0, Geometry(16, 16), name, options).condition)

    depth = Image.fromarray(np.linspace(500, 8000, 256).astype(np.uint16).reshape(16, 16))
    with pytest.warns(UserWarning, match="^condition: 16-bit depth"):
        assert fitted(depth, "depth")[0, 0, 0] == 0
    assert fitted(depth, "depth", unit="mm")[0, 0, 0] == 255
    ids = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 4)
    with pytest.warns(UserWarning, match="ade20k"):
        assert len(np.unique(fitted(ids, "segmentation").reshape(-1, 3), axis=0)) > 50
    with pytest.warns(UserWarning, match="coco"):
        assert tuple(fitted(ids, "segmentation", palette="coco")[0, 4]) == (119, 11, 32)
    dark = Image.new("L", (16, 16), 255)
    dark.paste(0, (3, 0, 4, 16))
    with pytest.warns(UserWarning, match="inverted"):
        assert fitted(dark, "canny").mean() < 127
    assert fitted(dark, "canny", invert=False).mean() > 127
    with pytest.raises(BadSample, match=r"'F'.* in 'the sample'"):
        fitted(Image.new("F", (16, 16)), "canny")
    with refused("unit", "'cm'"):
        fitted(depth, "depth", unit="cm")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("depth.png", np.full((8, 8), 300, np.uint16), "I;16"), ("ids.png", np.full((8, 8), 3, np.uint8), "L")],
)
def test_folders_keep_the_mode_of_maps(tmp_path, name, content, kind):
    picture(0, 8, 8).save(tmp_path / "a.jpg")
    Image.fromarray(content).save(tmp_path / name)
    row = {"file_name": "a.jpg", "text": "a", "map": name}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert FolderSource(tmp_path, condition_column="map").load(0).condition.mode == kind


@pytest.mark.parametrize("size", [(206, 100), (100, 200), (100, 103), (50, 23)])
def test_another_aspect_is_a_bad_sample_with_both_sizes(size):
    source = OneSample(picture(0, 200, 100), picture(1, *size))
    with pytest.raises(
        BadSample,
        match=rf"^condition: .* the image, 200x100, got {size[0]}x{size[1]} in 'the sample'$",
    ):
        fit_sample(source, 0, Geometry(16, 16), "canny", {})


@pytest.mark.parametrize(
    ("image", "size"), [((1000, 500), (1009, 500)), ((100, 67), (50, 33)), ((100, 67), (13, 9))]
)
def test_rounding_to_whole_pixels_is_no_other_aspect(image, size):
    source, geometry = OneSample(picture(0, *image), picture(1, *size)), Geometry(16, 16)
    fitted = geometry.fit(picture(1, *size), (16, 16), kind="depth", image_size=image)
    assert np.array_equal(fit_sample(source, 0, geometry, "depth", {}).condition, fitted)


def test_wrong_extractors_and_options_are_no_bad_samples():
    for argument, name, options in [("name", "cany", {}), ("options", "canny", {"lo": 1})]:
        with refused(argument, name if argument == "name" else "lo"):
            fit_sample(SceneSource(1), 0, Geometry(16, 16), name, options)


def test_the_sample_is_a_source():
    assert isinstance(OneSample(picture()), Source)


def maker(condition_name="canny", geometry=None, **options):
    """What is in the cache's key in addition to the sample's own content."""
    samples = ConditionedSource(SceneSource(1), geometry or Geometry(64, 64), condition_name, options)
    return samples.content_hash(0, KnownHashes(Path("never-written")))


def test_all_that_decides_a_map_is_in_the_key():
    first = maker()
    assert maker() == maker(low=100.0) == maker(low=100, high=200) == first  # the defaults
    assert maker("sketch", model="x" * 5000) != maker("sketch")  # no name of a file, since none is so long
    others = [maker(low=99.0), maker(auto=True), maker("sketch"), maker(geometry=Geometry(64, 128))]
    assert len({first, *others}) == 5


def test_a_folder_extractors_weights_are_in_the_key(tmp_path):
    """By their content, wherever they lie."""
    for name in ("model", "copy"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "weights.safetensors").write_bytes(b"1")
        (tmp_path / name / "config.json").write_text("{}")
    first = maker("depth", model=str(tmp_path / "model"))
    assert maker("depth", model=str(tmp_path / "copy")) == first
    assert maker("depth", model="somebody/model") != first
    for file, content in (("part/weights.safetensors", b"2"), ("config.json", b"[]"), ("more", b"")):
        (tmp_path / "copy" / file).write_bytes(content)
        changed = maker("depth", model=str(tmp_path / "copy"))
        assert changed != first
        first = changed
    (tmp_path / "edges.onnx").write_bytes(b"1")
    first = maker("sketch", model=str(tmp_path / "edges.onnx"))
    (tmp_path / "edges.onnx").write_bytes(b"2")
    assert maker("sketch", model=str(tmp_path / "edges.onnx")) != first


def test_only_options_that_may_name_a_file_are_looked_up(tmp_path, monkeypatch):
    """The working directory decides nothing about an option that is a word."""
    given = {"segmentation": {"palette": "voc"}, "depth": {"predicts": "nearness", "device": "cpu"}}
    before = {name: maker(name, **options) for name, options in given.items()}
    monkeypatch.chdir(tmp_path)
    for name in ("voc", "nearness", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert {name: maker(name, **options) for name, options in given.items()} == before


@pytest.mark.parametrize("where", ["the code", "a default", "a file that an option names"])
def test_a_users_extractor_that_changed_is_in_the_key(tmp_path, monkeypatch, where):
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["def outline(image, level=1.0, table=''):", "    return image"]
    (tmp_path / "table.csv").write_text("1")

    def hashed():
        (tmp_path / "mine.py").write_text("\n".join(lines))
        sys.modules.pop("mine", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        with EXTRACTORS.temporary():
            outline = importlib.import_module("mine").outline
            register_condition(
                replace(EXTRACTORS["canny"], name="outline", extract=outline, files=("table",))
            )
            return maker("outline", table=str(tmp_path / "table.csv"))

    first = hashed()
    assert hashed() == first
    if where == "the code":
        lines[1] += ".rotate(180)"
    elif where == "a default":
        lines[0] = lines[0].replace("1.0", "2.0")
    else:
        (tmp_path / "table.csv").write_text("2")
    assert hashed() != first


@pytest.mark.parametrize("changed", ["images", "maps"])
def test_changed_resizing_is_in_the_key(monkeypatch, changed):
    first, fit = maker(), Geometry.fit

    def fit_otherwise(self, image, target, *how, **others):
        if bool(how or others) == (changed == "maps"):
            return Image.new("RGB", target)
        return fit(self, image, target, *how, **others)

    monkeypatch.setattr(Geometry, "fit", fit_otherwise)
    assert maker() != first


@pytest.mark.parametrize(
    ("condition", "name", "reason"),
    [
        (Image.new("F", (24, 16)), "canny", "'F'"),
        (Image.new("L", (24, 3)), "depth", "24x3"),
        (Image.fromarray(np.full((16, 24), 300, np.uint16)), "segmentation", "from 0 to 255"),
    ],
    ids=["mode", "aspect", "labels"],
)
def test_a_map_is_refused_alike_whether_a_sample_is_fitted_or_only_looked_at(condition, name, reason):
    source = OneSample(picture(), condition)
    source.sample = replace(source.sample, condition_key="maps/a.png")
    samples = ConditionedSource(source, Geometry(16, 16), name)
    errors = []
    for read in (samples.load, samples.fit):
        with pytest.raises(BadSample, match=rf"^condition: .*{reason}.* in 'maps/a\.png'$") as caught:
            read(0)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_maps_of_every_kind_of_source_have_names_of_their_own(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(members([0])))
    source = TarSource([str(tmp_path / "a.tar")], condition_column="canny.png", index_folder=tmp_path / "i")
    assert source.load(0).condition_key.endswith("a.tar/00000.canny.png")
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    row = {"file_name": "a.png", "text": "a", "map": "a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert FolderSource(tmp_path, condition_column="map").load(0).condition_key == str(tmp_path / "a.png")
    assert not FolderSource(tmp_path).load(0).condition_key
