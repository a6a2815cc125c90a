import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tests.data.image_files import GOOD, encoded, exif, picture
from tests.refusals import refused

from nexus_adapters.conditions import images
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import BadSample, Source


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "maps").mkdir()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"maps/{number}.png").write_bytes(encoded(picture(10 + number)))
    (tmp_path / "3.jpg").write_bytes(encoded(picture(3), "JPEG", exif=exif(6)))
    rows = [
        {"file_name": name, "text": [f"the {name}", ""] if name == "1.png" else f"the {name}", "edges": maps}
        for name, maps in [
            ("2.png", "maps/2.png"),
            ("1.png", "maps/1.png"),
            ("gone.png", "maps/0.png"),
            ("3.jpg", "maps/gone.png"),
        ]
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_samples_as_listed(folder):
    source = FolderSource(folder, condition_column="edges")
    assert isinstance(source, Source)
    assert len(source) == 4
    sample = source.load(1)
    assert sample.key == source.key(1) == str(folder / "1.png")
    assert sample.captions == ("the 1.png", "")
    assert np.array_equal(sample.image, picture(1))
    assert sample.condition is not None
    assert np.array_equal(sample.condition, picture(11))
    assert FolderSource(str(folder)).load(0).condition is None


def test_sizes_are_upright(folder):
    source = FolderSource(folder)
    assert source.size(0) == (24, 16)
    assert source.size(3) == (16, 24) == source.load(3).image.size


def test_missing_files_are_found_when_they_are_read(folder):
    source = FolderSource(folder, condition_column="edges")
    for read in (source.load, source.size, source.content_hash):
        with pytest.raises(BadSample, match=r"gone\.png'"):
            read(2)
    with pytest.raises(BadSample, match=r"^condition: expected an image file, got '.*maps/gone\.png', which"):
        source.load(3)
    assert source.size(3) == (16, 24)


def test_hashes_follow_each_part(folder):
    def hashes(column="edges"):
        return [FolderSource(folder, condition_column=column).content_hash(index) for index in (0, 1)]

    before = hashes()
    assert before == hashes()
    assert before[0] != before[1]
    assert hashes(None) != before
    (folder / "maps/2.png").write_bytes(encoded(picture(99)))
    assert hashes()[0] != before[0]
    assert hashes()[1] == before[1]
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("the 1.png", "a 1.png"))
    assert hashes()[1] != before[1]


def test_stamps_follow_each_file(folder):
    source = FolderSource(folder, condition_column="edges")
    before = source.stamp(0)
    assert before == FolderSource(folder, condition_column="edges").stamp(0) != source.stamp(1)
    assert FolderSource(folder).stamp(0) != before
    Path(source.key(0)).touch()
    touched = source.stamp(0)
    assert touched != before
    source._condition(0).touch()
    assert source.stamp(0) != touched
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("the 1.png", "a 1.png"))
    assert FolderSource(folder, condition_column="edges").stamp(1) != source.stamp(1)
    Path(source.key(0)).unlink()
    assert source.stamp(0) is None


def test_it_can_go_to_another_process(folder):
    source = FolderSource(folder, condition_column="edges")
    other = pickle.loads(pickle.dumps(source))
    assert len(other) == len(source)
    assert other.content_hash(0) == source.content_hash(0)
    assert np.array_equal(other.load(0).image, source.load(0).image)


def test_only_what_is_asked_for_is_decoded(folder, monkeypatch):
    decoded = []
    original = images._decode_upright
    monkeypatch.setattr(images, "_decode_upright", lambda *a: decoded.append(a[0].name) or original(*a))
    source = FolderSource(folder, condition_column="edges")
    assert [source.size(index) for index in (0, 1, 3)]
    assert source.content_hash(0)
    assert decoded == []
    source.load(1)
    assert decoded == ["1.png", "1.png"]


def test_texts_beside_the_images(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "c.png"):
        (tmp_path / name).write_bytes(GOOD["grey.png"])
    (tmp_path / "b.txt").write_text("a grey picture\n")
    (tmp_path / "sub/a.txt").write_text("")
    source = FolderSource(tmp_path)
    assert [source.key(index) for index in range(3)] == [
        str(tmp_path / n) for n in ("b.png", "c.png", "sub/a.png")
    ]
    assert source.load(0).captions == ("a grey picture",)
    assert source.load(2).captions == ("",)
    for read in (source.load, source.content_hash):
        with pytest.raises(BadSample, match=r"^captions: '.*c\.png' has no '.*c\.txt'"):
            read(1)
    before = source.content_hash(0)
    (tmp_path / "b.txt").write_text("another text")
    assert source.content_hash(0) != before


def test_folders_that_are_none(tmp_path):
    with refused("folder", f"'{tmp_path / 'nowhere'}'"):
        FolderSource(tmp_path / "nowhere")
    with refused("folder", f"'{tmp_path}'", expected="metadata.jsonl, or images"):
        FolderSource(tmp_path)
    (tmp_path / "a.png").write_bytes(GOOD["grey.png"])
    with refused("folder", f"'{tmp_path}'", expected="metadata.jsonl, or images"):
        FolderSource(tmp_path)
    with refused("folder", f"'{tmp_path}', which has no metadata.jsonl", expected="columns"):
        FolderSource(tmp_path, condition_column="edges")
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with refused("folder", f"'{tmp_path}'", expected="samples in metadata.jsonl"):
        FolderSource(tmp_path)


def test_errors_come_before_any_image_is_opened(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(images, "_open", refuse)
    with refused("caption_column", "'texts'", expected="a column", hint="Did you mean"):
        FolderSource(folder, caption_column="texts")
    FolderSource(folder)
