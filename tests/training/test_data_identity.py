"""A run resumes on the same data wherever they lie, and on no others. It records the trained samples."""

import io
import json
import os
import shutil
import tarfile

import pytest
from tests import tiny
from tests.refusals import refused
from tests.training.runs import config, run, write_images

from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.tars import TarSource
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.training import data_identity as module
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.data_identity import (
    RECORD,
    TRAINED,
    DataIdentity,
    TrainedOn,
    data_identity,
    identity_of_data,
    read_trained,
    trained_on,
)
from nexus_adapters.training.run import dry_run


def identity_of(folder):
    source = FolderSource(str(folder))
    return data_identity(source, len(source))


def rewritten(folder, change):
    """`metadata.jsonl` after a change of its rows."""
    file = folder / "metadata.jsonl"
    rows = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def added(folder):
    tiny.image(seed=7).save(folder / "new.png")
    rewritten(folder, lambda rows: [*rows, {"file_name": "new.png", "text": "new"}])


CHANGES = {
    "one more": (added, "13 samples instead of 12"),
    "two less": (lambda f: rewritten(f, lambda rows: rows[2:]), "10 samples instead of 12"),
    "other images": (
        lambda f: [tiny.image(seed=i).save(f / f"{i:02d}.png") for i in (0, 4, 7)],
        "3 of 12 samples changed",
    ),
    "another caption": (
        lambda f: rewritten(f, lambda rows: [*rows[:-1], rows[-1] | {"text": "else"}]),
        "1 of 12 samples changed",
    ),
    "an image that cannot be read": (lambda f: (f / "03.png").unlink(), "1 of 12 samples changed"),
    "another order": (
        lambda f: rewritten(f, lambda rows: rows[::-1]),
        "the same 12 samples in another order",
    ),
}


@pytest.fixture(scope="module")
def started(root, tmp_path_factory):
    """A folder with `images` and a run on them of which one step is left."""
    folder = tmp_path_factory.mktemp("started")
    write_images(folder / "images", count=12)
    shutil.copytree(root / "base", folder / "base")
    changes = {
        "base__path": str(folder / "base"),
        "data__path": str(folder / "images"),
        "training__schedule": "constant",
    }
    run(root, folder / "run", **changes, training__max_train_steps=1)
    shutil.rmtree(folder / "run" / "adapter")
    return folder


def resumed(root, started, folder, path, work=run, base="base"):
    changes = {"data__path": str(path), "training__schedule": "constant", "training__max_train_steps": 2}
    return work(root, folder / "run", **changes, base__path=os.path.join(started, base))


def checked(root, out, **changes):
    return dry_run(config(root, out, **changes))


@pytest.mark.parametrize("kind", CHANGES)
def test_other_data_are_refused_in_words(root, started, tmp_path, kind):
    change, words = CHANGES[kind]
    shutil.copytree(started, tmp_path / "a")
    before = identity_of(tmp_path / "a" / "images")
    change(tmp_path / "a" / "images")
    now = identity_of(tmp_path / "a" / "images")
    assert before.change(now) == words
    assert before.digest != now.digest
    kept = (tmp_path / "a" / "run" / "config.toml").read_bytes()
    for work in (run, checked):
        with refused("data", words, expected="12 samples", hint="adapter.start_from"):
            resumed(root, started, tmp_path / "a", tmp_path / "a" / "images", work)
    assert (tmp_path / "a" / "run" / "config.toml").read_bytes() == kept


def test_the_record_may_be_lost(root, started, tmp_path):
    """Checkpoints have a hash of it, too."""
    shutil.copytree(started, tmp_path / "a")
    (tmp_path / "a" / "run" / "samples.json").unlink()
    added(tmp_path / "a" / "images")
    with refused("output_dir", "different data"):
        resumed(root, started, tmp_path / "a", tmp_path / "a" / "images")


def test_the_same_data_may_be_elsewhere(root, started, tmp_path, monkeypatch):
    """Moved, and named by a relative path with a slash behind it; the base, too."""
    shutil.copytree(started, tmp_path / "a")
    (tmp_path / "a" / "images").rename(tmp_path / "moved")
    (started / "base").rename(started / "moved base")
    monkeypatch.chdir(started)
    try:
        path = os.path.relpath(tmp_path / "moved") + "/"
        resumed(root, "", tmp_path / "a", path, base="moved base/")
    finally:
        (started / "moved base").rename(started / "base")
    assert (tmp_path / "a" / "run" / "adapter" / "config.json").is_file()
    kept = (tmp_path / "a" / "run" / "config.toml").read_text()
    assert f'path = "{tmp_path / "moved"}"' in kept
    assert f'path = "{started / "moved base"}"' in kept


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_another_base_in_the_same_folder(root, started, tmp_path, part):
    shutil.copytree(started, tmp_path / "a")
    file = started / "base" / part
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-2] + bytes(2) if "unet" in part else before.replace(b"0.012", b"0.013"))
        with refused("output_dir", "denoiser", hint="adapter.start_from"):
            resumed(root, started, tmp_path / "a", tmp_path / "a" / "images")
    finally:
        file.write_bytes(before)


def test_another_base_is_another_run(root, started):
    with refused("output_dir", expected="base.path", hint="adapter.start_from"):
        run(root, started / "run", base__path=str(root / "sd15"), training__schedule="constant")


class Many(SceneSource):
    """A large dataset that counts what is hashed of it."""

    def __init__(self, count):
        super().__init__(count)
        self.hashed = []

    def content_hash(self, index):
        self.hashed.append(index)
        return f"{index:064x}"


def test_of_many_samples_a_part_is_compared():
    source = Many(250_000)
    found = data_identity(source, len(source))
    assert len(source.hashed) == len(found.hashes) == 10_000
    assert max(source.hashed) > 240_000
    assert not found.is_whole
    other = DataIdentity(found.count, ("", *found.hashes[1:]))
    assert found.change(other) == "1 of 10,000 samples that were compared changed"


def test_what_would_have_to_be_downloaded_goes_by_its_name():
    source = Many(20)
    found = data_identity(source, 20, is_fetched=True)
    assert source.hashed == []
    assert len(set(found.hashes)) == 20


@pytest.mark.parametrize("count", [10_001, 15_000, 19_999])
def test_those_compared_are_spread_over_all(count):
    source = Many(count)
    data_identity(source, count)
    gaps = {b - a for a, b in zip(source.hashed, [*source.hashed[1:], count], strict=True)}
    assert len(source.hashed) == 10_000
    assert gaps <= {1, 2}


def folder_data(folder, **changes):
    return DataOptions(kind="folder", path=str(folder), resolution=64, **changes)


def recorded(root, images, out, trained, steps=100, **changes):
    """What a run on a folder records, and the source."""
    source = FolderSource(images)
    order = SampleOrder(dict.fromkeys(trained, ""), 2, 0)
    chosen = config(root, out, data__path=str(images), training__max_train_steps=steps, **changes)
    return trained_on(chosen, source, order, trained), source, order


def indices_in(record, source):
    return {index for index in range(len(source)) if record.has(source.image_hash(index))}


def test_a_record_names_the_trained_samples_by_content(root, tmp_path):
    images = write_images(tmp_path / "images", 6)
    record, source, _ = recorded(root, images, tmp_path / "run", [0, 2, 5])
    assert indices_in(record, source) == {0, 2, 5}
    assert record.is_complete
    images.rename(tmp_path / "moved")
    assert indices_in(record, FolderSource(tmp_path / "moved")) == {0, 2, 5}


def test_of_a_run_that_did_not_see_all_samples_those_it_saw_are_recorded(root, tmp_path):
    images = write_images(tmp_path / "images", 12)
    record, source, order = recorded(root, images, tmp_path / "run", range(12), steps=2)
    assert indices_in(record, source) == {int(i) for step in range(2) for i in order.at(step)}


def test_an_unreadable_sample_is_left_out_of_the_record_and_changes_the_data(root, tmp_path):
    images = write_images(tmp_path / "images", 4)
    before = identity_of_data(folder_data(images), tmp_path)
    (images / "01.png").unlink()
    record, _, _ = recorded(root, images, tmp_path / "run", range(3))
    assert len(record.images) == 2
    assert before.change(identity_of_data(folder_data(images), tmp_path)) == "1 of 4 samples changed"


@pytest.mark.parametrize("is_cached", [True, False])
def test_large_data_are_recorded_where_their_hashes_are_kept(root, tmp_path, is_cached, monkeypatch):
    monkeypatch.setattr(module, "_HASHED_WHOLE", 5)
    changes = {"cache__enabled": is_cached}
    record, source, _ = recorded(
        root, write_images(tmp_path / "images", 6), tmp_path / "run", range(6), **changes
    )
    assert indices_in(record, source) == (set(range(6)) if is_cached else set())
    assert record.is_complete == is_cached
    assert ("cache.enabled" in record.reason) != is_cached


def test_an_image_is_known_by_another_caption_and_map_in_another_kind_of_data(root, tmp_path):
    images = write_images(tmp_path / "images", 4)
    record, _, _ = recorded(root, images, tmp_path / "run", [0, 2])
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"text": "other words", "map": "03.png"}
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert indices_in(record, FolderSource(images)) == {0, 2}
    assert indices_in(record, FolderSource(images, condition_column="map")) == {0, 2}
    (images / "metadata.jsonl").unlink()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for file in sorted(images.glob("*.png")):
            tar.add(file, file.name)
            caption = tarfile.TarInfo(f"{file.stem}.txt")
            caption.size = 5
            tar.addfile(caption, io.BytesIO(b"words"))
    source = TarSource([str(tmp_path / "0.tar")], index_folder=tmp_path / "kept")
    assert indices_in(record, source) == {0, 2}


@pytest.mark.parametrize(
    ("changes", "is_complete"),
    [
        ({"data__kind": "scenes", "data__count": 4, "data__path": "", "data__resolution": 128}, True),
        ({"data__kind": "tars", "data__shards": ["https://a.org/0.tar"], "data__path": ""}, False),
    ],
)
def test_what_no_evaluation_has_and_what_is_unknown(root, tmp_path, changes, is_complete):
    source = SceneSource(4)
    order = SampleOrder(dict.fromkeys(range(4), ""), 2, 0)
    chosen = config(root, tmp_path / "run", **changes)
    record = trained_on(chosen, source, order, range(4))
    assert record == TrainedOn(is_complete=is_complete)
    assert bool(record.reason) != is_complete


@pytest.mark.parametrize(("first", "count"), [(1, 0), (0, 3)])
def test_the_identity_is_of_the_samples_that_are_used(first, count, tmp_path):
    images = write_images(tmp_path / "images", 4)
    whole = identity_of_data(folder_data(images), tmp_path)
    part = identity_of_data(folder_data(images, count=count), tmp_path, first)
    assert (part.count, part.hashes) == (3, whole.hashes[first : first + 3])
    (images / ("00.png" if first else "03.png")).write_bytes((images / "02.png").read_bytes())
    assert identity_of_data(folder_data(images, count=count), tmp_path, first) == part
    assert identity_of_data(folder_data(images), tmp_path) != whole


@pytest.mark.parametrize(
    "options",
    [
        DataOptions(kind="scenes", count=3),
        DataOptions(kind="table", path="owner/name"),
        DataOptions(kind="tars", shards=("https://example.org/0.tar",), caption_column="txt"),
        DataOptions(kind="folder", path="no/where"),
    ],
)
def test_what_is_not_here_has_no_identity(options, tmp_path):
    assert identity_of_data(options, tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"trained_on": 3}',
        '{"trained_on": {"images": 3, "is_complete": true}}',
        '{"trained_on": {"images": "é", "is_complete": true}}',
    ],
)
def test_other_records_say_nothing(content, tmp_path):
    assert read_trained(tmp_path) is None
    (tmp_path / "training.json").write_text(content)
    assert read_trained(tmp_path) is None


def test_hashes_are_computed_once(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 3)
    first = identity_of_data(folder_data(images), tmp_path)
    monkeypatch.setattr(FolderSource, "content_hash", lambda *given: pytest.fail("hashed again"))
    assert identity_of_data(folder_data(images), tmp_path) == first


def test_a_run_records_what_it_and_its_start_were_trained_on(root, tmp_path):
    """With and without a cache; from a run, a checkpoint, a published adapter, and one of unknown data."""
    others = write_images(tmp_path / "others", 16)
    for place in range(16):
        tiny.image(seed=500 + place).save(others / f"{place:02d}.png")
    tiny.image(seed=9).save(others / "more.png")
    first, theirs, ours = tmp_path / "first", FolderSource(root / "images"), FolderSource(others)
    run(root, first)
    assert len(indices_in(read_trained(first), theirs)) == 4  # two steps of two
    published = shutil.copytree(first / "adapter", tmp_path / "published")
    assert read_trained(published) == read_trained(first)
    unknown = shutil.copytree(published, tmp_path / "unknown")
    (unknown / "training.json").unlink()
    starts = {first: True, first / "checkpoints" / "step-00000002": True, published: True, unknown: False}
    for number, (start, is_known) in enumerate(starts.items()):
        out, is_last = tmp_path / str(number), number == len(starts) - 1
        chosen = {"adapter__start_from": str(start), "data__path": str(others)}
        trained = config(root, out, **chosen, cache__enabled=is_last)
        source = FolderSource(others)
        order = SampleOrder(dict.fromkeys(range(16), ""), 2, 0)
        record = trained_on(trained, source, order, range(16))
        assert len(indices_in(record, ours)) == 4
        assert len(indices_in(record, theirs)) == (4 if is_known else 0)
        assert record.is_complete == is_known
        assert ("started from" in record.reason) != is_known
    out = tmp_path / "second"
    changes = {"adapter__start_from": str(first), "data__path": str(others), "cache__enabled": False}
    with pytest.warns(UserWarning, match="more.png") as caught:
        run(root, out, **changes, training__schedule="constant")
    assert len([each for each in caught if "more.png" in str(each.message)]) == 1
    record = read_trained(out)
    assert (len(indices_in(record, ours)), len(indices_in(record, theirs))) == (4, 4)
    assert (
        json.loads((out / "adapter" / "training.json").read_text())["trained_on"]
        == (record.as_json()["trained_on"])
    )
    assert (out / RECORD).is_file()
    assert (out / TRAINED).is_file()
