"""From photos to an adapter on the embedded base, by the commands that users have."""

import json

import pytest
from tests.data.image_files import encoded

from nexus_adapters import NexusAdapter
from nexus_adapters.cli import main
from nexus_adapters.embedded.scene_source import SceneSource

RECIPE = "embedded-canny"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    photos, source = root / "photos", SceneSource(12)
    photos.mkdir()
    for index in range(12):
        sample = source.load(index)
        (photos / f"{index:02d}.jpg").write_bytes(
            encoded(sample.image.resize((300, 200)), "JPEG", quality=95)
        )
        (photos / f"{index:02d}.txt").write_text(sample.captions[0])
    argv = [
        "--conditions",
        "canny,sketch",
        "--resolution",
        "128",
        "--shard-size",
        "5",
        "--out",
        str(root / "set"),
    ]
    assert main(["prepare", str(photos), *argv]) == 0
    return root


@pytest.mark.parametrize(
    ("condition", "is_cached"), [pytest.param("canny", True, marks=pytest.mark.full), ("sketch", False)]
)
def test_photos_in_adapter_out(prepared, tmp_path, condition, is_cached):
    settings = {
        "output_dir": tmp_path / "run",
        "data.kind": "prepared" if is_cached else "folder",  # where the index says what it is
        "data.path": prepared / "set",
        "data.condition": condition,
        "data.count": 0,
        "cache.enabled": str(is_cached).lower(),
        "cache.folder": tmp_path / "cache",
        "training.max_train_steps": 2,
        "training.batch_size": 2,
        "training.warmup_steps": 0,
        "validation.every_steps": 2,
        "validation.images": 1,
        "validation.num_inference_steps": 2,
        "log.every_steps": 1,
    }
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", RECIPE, *pairs]) == 0
    assert isinstance(NexusAdapter.from_pretrained(tmp_path / "run" / "adapter"), NexusAdapter)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("structure_score" in row for row in rows)


@pytest.mark.parametrize(
    ("kind", "changes", "shown"),
    [
        ("prepared", {"data.path": "nowhere"}, ["data.path: ", "nexus prepare", "'nowhere'"]),
        ("prepared", {"data.condition": "depth"}, ["data.condition: ", "canny, sketch", "'depth'"]),
        ("prepared", {"data.caption_column": "txt"}, ["data.caption_column: ", "'prepared'", "'txt'"]),
        ("folder", {"data.condition": "depth"}, ["data.condition: ", "canny, sketch", "'depth'"]),
        ("folder", {"data.caption_column": "txt"}, ["data.caption_column: ", "'prepared'", "'txt'"]),
    ],
)
def test_what_is_no_such_set_is_refused(prepared, tmp_path, capsys, kind, changes, shown):
    """By its kind, or by the index that it has."""
    settings = {
        "output_dir": tmp_path / "run",
        "data.kind": kind,
        "data.path": prepared / "set",
        "data.count": 0,
    } | changes
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", RECIPE, "--dry-run", *pairs]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith(f"nexus train: error: {shown[0]}")
    assert all(part in line for part in shown)
