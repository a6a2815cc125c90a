"""A run resumes on the same data wherever they lie, and on no others."""

import json
import os
import shutil

import pytest
from tests import tiny
from tests.refusals import refused
from tests.training.runs import config, run, write_images

from nexus_adapters.data.folder import FolderSource
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.training.data_identity import DataIdentity, data_identity
from nexus_adapters.training.run import dry_run


def identity_of(folder):
    source = FolderSource(str(folder))
    return data_identity(source, len(source), True)


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
    with refused("output_dir", "another data"):
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
    """A large data set that counts what is hashed of it."""

    def __init__(self, count):
        super().__init__(count)
        self.hashed = []

    def content_hash(self, index):
        self.hashed.append(index)
        return f"{index:064x}"


def test_of_many_samples_a_part_is_compared():
    source = Many(250_000)
    found = data_identity(source, len(source), True)
    assert len(source.hashed) == len(found.hashes) == 10_000
    assert max(source.hashed) > 240_000
    other = DataIdentity(found.count, ("", *found.hashes[1:]))
    assert found.change(other) == "1 of 10,000 samples that were compared changed"


def test_what_would_have_to_be_downloaded_goes_by_its_name():
    source = Many(20)
    found = data_identity(source, 20, False)
    assert source.hashed == []
    assert len(set(found.hashes)) == 20
