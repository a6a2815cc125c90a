import json

import pytest
from tests.training.runs import run, write_images

from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.trained_on import data_sha256, read_record, record_of


def data(folder, **changes):
    return DataOptions(kind="folder", path=str(folder), resolution=64, **changes)


def recorded(images, out, trained, steps=100):
    """A run's folder with a record, and the source."""
    source = FolderSource(images)
    order = SampleOrder(dict.fromkeys(trained, ""), 2, 0)
    (out / "adapter").mkdir(parents=True)
    record = record_of(data(images), source, order, trained, steps, out / "cache")
    (out / "adapter" / "training.json").write_text(json.dumps({"steps": steps} | record))
    return read_record(out), source, order


def trained_on(record, source):
    return {index for index in range(len(source)) if record.has(source.content_hash(index))}


def test_a_record_names_the_trained_samples_by_content(tmp_path):
    images = write_images(tmp_path / "images", 6)
    record, source, _ = recorded(images, tmp_path / "run", [0, 2, 5])
    assert trained_on(record, source) == {0, 2, 5}
    assert read_record(tmp_path / "run" / "adapter") == record  # what is published says it too
    images.rename(tmp_path / "moved")
    moved = FolderSource(tmp_path / "moved")
    assert trained_on(record, moved) == {0, 2, 5}
    assert record.data_sha256 == data_sha256(data(tmp_path / "moved"), tmp_path / "cache") != ""


def test_of_a_run_that_did_not_see_all_samples_those_it_saw_are_recorded(tmp_path):
    images = write_images(tmp_path / "images", 12)
    record, source, order = recorded(images, tmp_path / "run", range(12), steps=2)
    assert trained_on(record, source) == {int(i) for step in range(2) for i in order.at(step)}


def test_a_run_records_what_it_trained_on(root, tmp_path):
    out = tmp_path / "run"
    run(root, out)
    record, source = read_record(out), FolderSource(root / "images")
    assert len(trained_on(record, source)) == 4  # two steps of two
    assert record.data_sha256 == data_sha256(data(root / "images"), tmp_path)


def test_an_unreadable_sample_is_left_out_of_the_record_and_changes_the_data(tmp_path):
    images = write_images(tmp_path / "images", 4)
    before = data_sha256(data(images), tmp_path)
    (images / "01.png").unlink()
    record, _, _ = recorded(images, tmp_path / "run", range(3))
    assert len(record.samples) == 2
    assert record.data_sha256 != before


@pytest.mark.parametrize(("first", "count"), [(1, 0), (0, 3)])
def test_the_hash_covers_the_samples_that_are_used(first, count, tmp_path):
    images = write_images(tmp_path / "images", 4)
    whole = data_sha256(data(images), tmp_path)
    part = data_sha256(data(images, count=count), tmp_path, first)
    assert part != whole
    (images / ("00.png" if first else "03.png")).write_bytes((images / "02.png").read_bytes())
    assert data_sha256(data(images, count=count), tmp_path, first) == part
    assert data_sha256(data(images), tmp_path) != whole


@pytest.mark.parametrize(
    "options",
    [
        DataOptions(kind="scenes", count=3),
        DataOptions(kind="table", path="owner/name"),
        DataOptions(kind="tars", shards=("https://example.org/0.tar",), caption_column="txt"),
        DataOptions(kind="folder", path="no/where"),
    ],
)
def test_what_is_not_here_has_no_hash(options, tmp_path):
    assert data_sha256(options, tmp_path) == ""


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"trained_on": 3, "data_sha256": ""}',
        '{"trained_on": "é", "data_sha256": ""}',
    ],
)
def test_other_records_say_nothing(content, tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "training.json").write_text(content)
    assert read_record(tmp_path) is None


def test_hashes_are_computed_once(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 3)
    first = data_sha256(data(images), tmp_path)
    monkeypatch.setattr(FolderSource, "content_hash", lambda *given: pytest.fail("hashed again"))
    assert data_sha256(data(images), tmp_path) == first
