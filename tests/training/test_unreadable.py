"""Whole runs on 200 images of which 40 cannot be read, and on so many that they have to stop."""

import json
import shutil

import pytest
from PIL import Image
from tests import tiny
from tests.data.test_corrupt import BAD_NAMES, COUNT, FILES
from tests.refusals import refused
from tests.training.runs import CAPTIONS, SMALL_UNET, run, write_images

from nexus_adapters.data.feed import permutation

HELD_OUT = int(permutation(20, (0, 2**32))[0])  # of twenty samples, where seed 0 holds out one


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("unreadable")
    tiny.sd15(unet=tiny.unet(**SMALL_UNET)).save_pretrained(root / "base")
    (root / "images").mkdir()
    lines = []
    for index, (name, content) in enumerate(FILES.items()):
        if content is not None:
            (root / "images" / name).write_bytes(content)
        lines.append(json.dumps({"file_name": name, "text": CAPTIONS[index % 4]}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    return root


def reported(out):
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert all(row["reason"] for row in rows)
    return sorted(row["key"].rpartition("/")[2] for row in rows)


@pytest.mark.parametrize("buckets", [False, True])
def test_the_run_completes_and_reports_each_by_its_path(root, tmp_path, buckets, capsys):
    run(root, tmp_path / "out", training__batch_size=20, data__aspect_buckets=buckets)
    assert (tmp_path / "out" / "adapter" / "config.json").is_file()
    assert reported(tmp_path / "out") == sorted(BAD_NAMES)
    assert f"{len(BAD_NAMES)} of {COUNT} samples are unreadable" in capsys.readouterr().err


def test_without_a_cache_each_is_reported_when_it_comes_up(root, tmp_path):
    """Once each, also if the run is resumed in a second epoch."""
    changes = {"training__batch_size": 100, "cache__enabled": False, "training__schedule": "constant"}
    run(root, tmp_path / "out", **changes, training__max_train_steps=2)
    assert reported(tmp_path / "out") == sorted(BAD_NAMES)
    run(root, tmp_path / "out", **changes, training__max_train_steps=3)
    assert reported(tmp_path / "out") == sorted(BAD_NAMES)


def test_one_that_none_of_its_shape_can_replace_is_left_out(root, tmp_path):
    """Images of one shape, and a single one of another, which cannot be read."""
    folder, out = write_images(tmp_path / "images", count=12), tmp_path / "out"
    Image.new("RGB", (400, 200)).save(folder / "07.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:-40])
    changes = {"data__resolution": 256, "data__aspect_buckets": True, "training__batch_size": 1}
    run(root, out, **changes, data__path=str(folder))
    assert reported(out) == ["07.png"]
    assert (out / "adapter").is_dir()


def test_a_held_out_sample_may_be_alone_in_its_shape(root, tmp_path):
    """Without a cache, too: nothing could stand in for it, and nothing has to."""
    folder = write_images(tmp_path / "images", count=20)
    for index in range(20):
        Image.new("RGB", (400, 200) if index == HELD_OUT else (200, 200)).save(folder / f"{index:02d}.png")
    changes = {"data__resolution": 256, "data__aspect_buckets": True, "cache__enabled": False}
    changes |= {"validation__every_steps": 2, "validation__samples": 1, "validation__images": 0}
    run(root, tmp_path / "out", **changes, data__path=str(folder), training__batch_size=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2]


@pytest.mark.parametrize("cached", [True, pytest.param(False, marks=pytest.mark.full)])
def test_unreadable_samples_are_not_held_out(root, tmp_path, cached):
    """Nothing could be generated from them, and what would replace them is trained on."""
    changes = {"validation__every_steps": 2, "validation__samples": 20, "validation__images": 2}
    run(root, tmp_path / "out", **changes, cache__enabled=cached)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1


def test_too_many_stop_the_run(root, tmp_path):
    with refused("data.max_bad_fraction", "40, such as", expected="at most 0.1 of 200"):
        run(root, tmp_path / "out", data__max_bad_fraction=0.1)
    assert reported(tmp_path / "out") == sorted(BAD_NAMES)
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.fixture(scope="module")
def captioned(root, tmp_path_factory):
    """Twelve images, of whose captions one is no Unicode text, three are empty and four are cut."""
    folder = write_images(tmp_path_factory.mktemp("captioned") / "images", count=12)
    texts = ["lone \ud800 half", *([""] * 3), *(["a red star on a blue ring " * 9] * 4), *(["a cat"] * 4)]
    rows = [{"file_name": f"{index:02d}.png", "text": text} for index, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("is_cached", [True, False])
def test_captions_that_are_no_text_or_empty_or_cut_are_counted_in_a_line_each(
    root, tmp_path, captioned, capfd, is_cached
):
    changes = {"data__path": str(captioned), "cache__enabled": is_cached, "training__batch_size": 4}
    for steps in (2, 3):  # the second run finds all in the cache
        with pytest.warns(UserWarning, match="data: ") as caught:
            run(root, tmp_path / f"{steps}", **changes, training__max_train_steps=steps)
        shown = [str(warning.message) for warning in caught]
        assert sum("empty caption: 3 of 1" in line for line in shown) == 1, shown
        assert sum("12 tokens" in line and "truncated: 4 of 1" in line for line in shown) == 1, shown
        assert reported(tmp_path / f"{steps}") == ["00.png"]
        (row,) = (tmp_path / f"{steps}" / "skipped.jsonl").read_text().splitlines()
        assert json.loads(row)["reason"].startswith("captions: ")
    assert len(capfd.readouterr().err) < 2000


def test_captions_that_are_all_empty_are_reported(root, tmp_path, captioned):
    folder = shutil.copytree(captioned, tmp_path / "images")
    rows = [{"file_name": f"{index:02d}.png", "text": " " * (index % 2)} for index in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="samples with an empty caption: 12 of 12"):
        run(root, tmp_path / "out", data__path=str(folder))
