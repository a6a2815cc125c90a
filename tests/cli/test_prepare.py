import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conditions import tiny_models
from tests.data.image_files import encoded, picture
from tests.data.tar_files import members, tar
from tests.prepare.sets import digests, image, index, samples, skipped, write_folder

from nexus_adapters.cli import main
from nexus_adapters.cli.prepare import read_conditions
from nexus_adapters.conditions import extract


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", 6)


def run(*argv):
    return main(["prepare", *map(str, argv)])


def test_makes_a_set_and_leaves_it_alone_when_run_again(photos, tmp_path, capsys):
    (photos / "002.png").write_bytes(b"broken")
    argv = (photos, "--conditions", "canny,sketch", "--option", "canny.auto=true", "--out", tmp_path / "set")
    assert run(*argv, "--resolution", 24) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'set'}: 5 samples; see {tmp_path / 'set' / 'preview.html'} for examples\n"
    assert (
        f"nexus prepare: left out 1 sample (1 unreadable); see {tmp_path / 'set' / 'skipped.jsonl'}\n" in err
    )
    found = samples(tmp_path / "set")
    assert {image(files["jpg"]).size for files in found.values()} == {(24, 24)}
    assert index(tmp_path / "set")["settings"]["conditions"]["canny"]["auto"] is True
    assert skipped(tmp_path / "set")[0]["source"] == "002.png"
    before = digests(tmp_path / "set")
    assert run(*argv, "--resolution", 24) == 0
    assert "finished" in capsys.readouterr().err
    assert digests(tmp_path / "set") == before


def test_a_dry_run_shows_what_would_be_made_and_writes_nothing(photos, tmp_path, capsys):
    (photos / "001.png").write_bytes(b"broken")
    (photos / "002.txt").write_text("")
    (photos / "003.txt").write_text("lone \udcff", errors="surrogateescape")
    argv = (photos, "--conditions", "canny,sketch", "--out", tmp_path / "set", "--max-aspect", 1.3)
    (photos / "004.png").write_bytes(encoded(picture(4, 64, 30)))
    assert run(*argv, "--resolution", 40, "--shard-size", 4, "--dry-run") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert all(part in first for part in ("6 samples", "2 shards", "40x40", "canny, sketch"))
    parts = ("3 of 6", "1 of 3", "3 of 3")  # left out, without words, small
    assert [part in line for part, line in zip(parts, lines, strict=True)] == [True] * 3
    assert "(unreadable 2, aspect 1)" in lines[0]
    assert not (tmp_path / "set").exists()
    assert run(*argv) == 0
    before = digests(tmp_path / "set")
    assert run(*argv, "--dry-run") == 0
    assert "already finished" in capsys.readouterr().out
    assert run(*argv, "--dry-run", "--seed", 5) == 2  # as without --dry-run
    assert "--seed" in capsys.readouterr().err
    assert digests(tmp_path / "set") == before


def test_a_preview_shows_samples_as_they_would_be_written(photos, tmp_path, capsys):
    (photos / "001.png").write_bytes(b"broken")
    argv = (photos, "--conditions", "canny,sketch", "--out", tmp_path / "set")
    page = tmp_path / "page.html"
    assert run(*argv, "--preview", page) == 0
    assert "6 samples" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert (text.count("<figure>"), text.count("<img ")) == (5, 15)
    assert "picture 3" in text
    assert not (tmp_path / "set").exists()
    assert run(*argv, "--preview", page) == 2
    assert "--preview" in capsys.readouterr().err


def test_images_without_captions_and_what_is_ignored(photos, tmp_path, capsys):
    for text in photos.glob("*.txt"):
        text.unlink()
    (photos / "film.mp4").touch()
    argv = (photos, "--conditions", "canny", "--workers", 1)
    assert run(*argv, "--out", tmp_path / "refused") == 2
    assert "--captions none" in capsys.readouterr().err
    assert run(*argv, "--captions", "none", "--out", tmp_path / "set") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "ignored files that are neither images nor captions: 1 (film.mp4)" in line
    assert {files["txt"] for files in samples(tmp_path / "set").values()} == {b""}


def test_captions_that_are_links_need_leave(photos, tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (photos / "000.txt").unlink()
    (photos / "000.txt").symlink_to(tmp_path / "secret.txt")
    argv = (photos, "--conditions", "canny", "--workers", 1, "--out", tmp_path / "set")
    assert run(*argv) == 2
    assert "000.txt" in capsys.readouterr().err
    assert run(*argv, "--allow-outside") == 0
    assert samples(tmp_path / "set")["000000000"]["txt"] == b"secret"


def test_an_option_of_the_only_map_needs_no_name():
    """Whether it has one or not, also where its value has a dot."""
    expected = {"canny": {"low": 3.5, "auto": True}}
    assert read_conditions("canny", ["low=3.5", "canny.auto=true"]) == expected
    assert read_conditions("canny", ["canny.low=3.5", "auto=true"]) == expected


def test_all_options_reach_the_set(photos, tmp_path):
    (photos / "005.txt").write_text("a very long caption")
    assert run(
        photos, "--conditions", "canny", "--out", tmp_path / "set", "--kind", "folder", "--count", 6,
        "--resolution", 64, "--aspect-buckets", "--captions", "random", "--image-format", "png",
        "--shard-size", 2, "--seed", 3, "--min-side", 10, "--max-aspect", 3, "--min-caption-length", 2,
        "--max-caption-length", 12, "--near-duplicates", "--workers", 2, "--batch-size", 3,
    ) == 0  # fmt: skip
    settings = index(tmp_path / "set")["settings"]
    assert settings["filters"] == {
        "min_side": 10, "max_aspect": 3.0, "min_caption_length": 2, "max_caption_length": 12,
        "near_duplicates": 4,
    }  # fmt: skip
    found = {
        name: settings[name] for name in ("captions", "image_format", "shard_size", "batch_size", "seed")
    }
    assert found == {"captions": "random", "image_format": "png", "shard_size": 2, "batch_size": 3, "seed": 3}
    assert len(settings["geometry"]["buckets"]) == 1  # at 64 pixels, steps of 64 leave the square
    assert {row["kind"] for row in skipped(tmp_path / "set")} <= {"caption", "near-duplicate"}
    assert "caption" in {row["kind"] for row in skipped(tmp_path / "set")}


def test_learned_maps_by_folders(photos, tmp_path, capfd):
    model = tiny_models.dpt(tmp_path / "model")
    capfd.readouterr()
    argv = ("--conditions", "depth", "--option", f"depth.model={model}", "--image-format", "png")
    assert run(photos, *argv, "--out", tmp_path / "set") == 0
    assert capfd.readouterr().err == ""
    for files in samples(tmp_path / "set").values():
        expected = extract("depth", image(files["png"]), model=model)
        assert image(files["depth.png"]).size == expected.size


def write_coco(root):
    """A miniature of COCO 2017's folder: two splits, several captions, one grey image."""
    for split, count in (("train2017", 2), ("val2017", 1)):
        write_folder(root / split, 0)
        images, annotations = [], []
        for number in range(count):
            identity = 100 + 37 * number
            name = f"{identity:012d}.jpg"
            extract_from = image(encoded_scene(number))
            (extract_from.convert("L") if number == 1 else extract_from).save(root / split / name, quality=95)
            images.append({"id": identity, "file_name": name, "height": 96, "width": 128, "license": 1})
            annotations += [
                {
                    "id": 1000 * number + k,
                    "image_id": identity,
                    "caption": f"{split} {number}, said in way {k}",
                }
                for k in range(5)
            ]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"info": {}, "licenses": [], "images": images[::-1], "annotations": annotations[::-1]}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


def encoded_scene(number):
    from tests.data.image_files import encoded

    from nexus_adapters.embedded.scene_source import SceneSource

    return encoded(SceneSource(9).load(number).image.crop((0, 0, 128, 96)))


def test_the_coco_recipe(tmp_path):
    """The command of docs/reference/data.md on a miniature of COCO, with tiny models for the default ones."""
    coco = write_coco(tmp_path / "coco")
    models = [
        "--option", f"depth.model={tiny_models.dpt(tmp_path / 'dpt')}",
        "--option", f"segmentation.model={tiny_models.segformer(tmp_path / 'segformer')}",
    ]  # fmt: skip
    documented = coco_command()
    assert documented[:2] == ["nexus", "prepare"]
    places = {"path/to/coco": str(coco), "coco-512": str(tmp_path / "set")}
    assert run(*(places.get(word, word) for word in documented[2:]), *models) == 0
    found = samples(tmp_path / "set")
    assert len(found) == 2
    for number, files in enumerate(found.values()):
        assert set(files) == {
            "jpg", "canny.png", "depth.png", "sketch.png", "segmentation.png", "json", "txt",
        }  # fmt: skip
        assert all(image(files[name]).size == (512, 512) for name in files if name.endswith(("jpg", "png")))
        assert json.loads(files["json"])["captions"] == [f"train2017 {number}, said in way 0"]
        assert json.loads(files["json"])["source"] == f"train2017/{100 + 37 * number:012d}.jpg"
    argv = ("--split", "val2017", "--conditions", "canny", "--captions", "random", "--out", tmp_path / "v")
    assert run(coco, *argv) == 0
    assert len(samples(tmp_path / "v")) == 1


def coco_command():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "data.md").read_text()
    command = next(block for block in page.split("```") if "path/to/coco" in block)
    return command.replace("\\\n", " ").split()


@pytest.mark.parametrize(
    ("argv", "name", "shown"),
    [
        (["--conditions", "canny,edges"], "--conditions", "'edges'"),
        (["--conditions", "canny,canny"], "--conditions", "'canny,canny'"),
        (["--conditions", "canny,sketch", "--option", "low=3"], "--option", "'low=3'"),
        (["--conditions", "canny", "--option", "sketch.sigma=3"], "--option", "'sketch.sigma=3'"),
        (["--conditions", "canny", "--option", "canny.size=3"], "--option", "'size'"),
        (["--conditions", "canny", "--option", "canny.low=x"], "--option canny.low", "'x'"),
        (["--conditions", "depth", "--option", "depth.model=no/such"], "--option depth.model", "'no/such'"),
        (["--conditions", "canny", "--workers", "0"], "--workers", "got 0"),
        (["--conditions", "canny", "--ray-address", "auto"], "--ray-address", "--engine local"),
        (["--conditions", "canny", "--gpus-each", "1"], "--gpus-each", "--engine local"),
        (["--conditions", "canny", "--aspect-buckets"], "--resolution", "--aspect-buckets needs it"),
        (["--conditions", "canny", "--min-side", "-1"], "--min-side", "got -1"),
        (["--conditions", "canny", "--resolution", "0"], "--resolution", "got 0"),
        (["--conditions", "canny", "--resolution", "100"], "--resolution", "got 100"),
        (["--conditions", "canny", "--resolution", "9", "--aspect-buckets"], "--resolution", "got 9"),
        (["--conditions", "canny", "--shard-size", "0"], "--shard-size", "got 0"),
        (["--conditions", "canny", "--batch-size", "0"], "--batch-size", "got 0"),
        (["--conditions", "canny", "--seed", "-1"], "--seed", "got -1"),
        (["--conditions", "canny", "--count", "-1"], "--count", "got -1"),
        (["--conditions", "canny", "--count", "0"], "--count", "got 0"),
        (["--conditions", "canny", "--max-aspect", "0.5"], "--max-aspect", "got 0.5"),
        (["--conditions", "canny", "--min-caption-length", "-1"], "--min-caption-length", "got -1"),
        (["--conditions", "canny", "--max-caption-length", "-1"], "--max-caption-length", "got -1"),
        (["--conditions", "canny", "--near-duplicates", "16"], "--near-duplicates", "got 16"),
        (["--conditions", "canny", "--min-side", "9999"], "SOURCE", "6 small"),
        (["--conditions", "canny", "--split", "val"], "--split", "'val'"),
        (["--conditions", "canny", "--revision", "v2"], "--revision", "'v2'"),
        (["--conditions", "canny", "--config-name", "small"], "--config-name", "'small'"),
        (["--conditions", "canny", "--image-column", "picture"], "SOURCE", "metadata.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(photos, tmp_path, capsys, argv, name, shown):
    assert run(photos, *argv, "--out", tmp_path / "set") == 2
    refused_in_one_line(capsys, name, shown)


def refused_in_one_line(capsys, name, shown):
    """Nothing on stdout; on stderr the name of what the user typed, and what was wrong with it."""
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(rf"nexus prepare: error: {re.escape(name)}(:| is required)", err), err
    assert str(shown) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "name", "shown"),
    [
        (["nowhere"], "SOURCE", "'nowhere'"),
        (["nowhere", "--kind", "folder"], "SOURCE", "'nowhere'"),
        (["nowhere", "--kind", "coco"], "SOURCE", "'nowhere/train2017'"),
        (["nowhere", "--kind", "table"], "SOURCE", "'nowhere'"),
        (["nowhere.tar"], "SOURCE", "'nowhere.tar'"),
        (["annotated"], "SOURCE", "captions_train2017.json"),
        (["annotated", "--split", "val2017"], "--split", "'val2017'"),
        (["listed"], "SOURCE", "line 1"),
        (["listed", "--caption-column", "texts"], "SOURCE", "line 1"),
        (["named", "--caption-column", "texts"], "--caption-column", "'texts'"),
        (["named", "--image-column", "picture"], "--image-column", "'picture'"),
        (["scenes"], "--count", "required"),
        (["scenes", "--count", "-1"], "--count", "got -1"),
        (["scenes", "--count", "0"], "--count", "got 0"),
    ],
)
def test_what_is_wrong_with_a_source_names_what_was_typed(tmp_path, monkeypatch, capsys, argv, name, shown):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "annotated" / "train2017", 1)
    (tmp_path / "annotated" / "annotations").mkdir()
    (tmp_path / "annotated" / "annotations" / "captions_train2017.json").write_text("{}")
    for folder, line in (("listed", "[]"), ("named", '{"file_name": "000.png", "text": "a"}')):
        write_folder(tmp_path / folder, 1)
        (tmp_path / folder / "metadata.jsonl").write_text(line)
    assert run(*argv, "--conditions", "canny", "--out", tmp_path / "set") == 2
    refused_in_one_line(capsys, name, shown)


@pytest.mark.parametrize(
    ("argv", "name", "shown"),
    [
        (["--seed", "1"], "--seed", "got 1"),
        (["--captions", "first"], "--captions", "got first"),
        (["--min-side", "3"], "--min-side", "got 3"),
        (["--near-duplicates"], "--near-duplicates", "got 4"),
        (["--resolution", "64"], "--resolution", "got 64"),
        (["--option", "canny.low=3"], "--option canny.low", "got 3"),
        (["--conditions", "canny,sketch"], "--conditions", "got canny, sketch"),
        (["--count", "2"], "SOURCE", "got 2 samples"),
    ],
)
def test_other_settings_than_those_it_was_begun_with_name_the_option(begun, capsys, argv, name, shown):
    out = begun / "set"
    assert run(begun / "photos", "--conditions", "canny", "--out", out, *argv) == 2
    refused_in_one_line(capsys, name, shown)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    write_folder(folder / "photos", 3)
    assert run(folder / "photos", "--conditions", "canny", "--out", folder / "set") == 0
    return folder


def test_a_folder_with_other_files_is_refused(photos, capsys):
    assert run(photos, "--conditions", "canny", "--out", photos) == 2
    refused_in_one_line(capsys, "--out", f"'{photos}'")


def test_a_cache_that_cannot_be_made_names_what_sets_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "a.tar").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(tmp_path / "a.tar", "--conditions", "canny", "--out", tmp_path / "set") == 2
    refused_in_one_line(capsys, "XDG_CACHE_HOME", f"{tmp_path / 'file'}")


def test_lists_of_urls_are_not_fetched(tmp_path, capsys):
    (tmp_path / "urls.txt").write_text("https://example.com/a.jpg\n")
    assert run(tmp_path / "urls.txt", "--conditions", "canny", "--out", tmp_path / "set") == 2
    err = capsys.readouterr().err
    assert err.startswith("nexus prepare: error: SOURCE: ")
    assert f"'{tmp_path / 'urls.txt'}'" in err
    assert "img2dataset" in err


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.full), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_it_at_once_and_the_same_command_resumes(tmp_path, number, status):
    argv = [
        "scenes", "--count", "120", "--conditions", "sketch", "--workers", "2", "--shard-size", "4",
        "--out", str(tmp_path / "set"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "nexus_adapters.cli", "prepare", *argv],
        stderr=subprocess.PIPE,
        text=True,
        # Shells let what they start in the background ignore Ctrl-C, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("set/*.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert not (tmp_path / "set" / "index.json").exists()
    assert main(["prepare", *argv]) == 0
    assert main(["prepare", *argv[:-1], str(tmp_path / "unbroken")]) == 0
    assert digests(tmp_path / "set") == digests(tmp_path / "unbroken")


def test_an_installation_without_the_extra_is_refused(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert run(photos, "--conditions", "canny", "--out", tmp_path / "set") == 2
    err = capsys.readouterr().err
    assert "filelock is required" in err
    assert "pip install filelock" in err


def test_a_dry_run_refuses_a_source_of_which_nothing_can_be_used(photos, tmp_path, capsys):
    argv = (photos, "--conditions", "canny", "--out", tmp_path / "set", "--min-side", 5000)
    for more in (
        ["--dry-run"],
        ["--preview", tmp_path / "page.html"],
        ["--workers", 1],
    ):
        assert run(*argv, *more) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert line.startswith("nexus prepare: error: SOURCE: expected at least one usable sample, got 6")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("kind", ["folder", "parquet", "jsonl", "image folder", "tars", "scenes"])
def test_a_log_has_lines_and_no_bars(photos, tmp_path, monkeypatch, capfd, kind):
    """By no kind of source, nor by the libraries that read it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    names = sorted(photos.glob("*.png"))
    rows = [{"file_name": name.name, "text": name.stem} for name in names]
    source, options = photos, []
    if kind == "parquet":
        source = tmp_path / "a.parquet"
        images = [{"bytes": name.read_bytes(), "path": None} for name in names]
        table = {"image": images, "text": [name.stem for name in names]}
        pq.write_table(pa.table(table), source)
    elif kind in ("jsonl", "image folder"):
        for text in photos.glob("*.txt"):
            text.unlink()
        rows = [json.dumps(row) for row in rows]
        (photos / ("rows.jsonl" if kind == "jsonl" else "metadata.jsonl")).write_text("\n".join(rows))
        source = photos / "rows.jsonl" if kind == "jsonl" else photos
        options = ["--kind", "table"]
    elif kind == "tars":
        source = tmp_path / "a.tar"
        source.write_bytes(tar(members(range(3))))
    elif kind == "scenes":
        source, options = "scenes", ["--count", 3]
    try:
        assert run(source, "--conditions", "canny", "--out", tmp_path / "set", "--dry-run", *options) == 0
        assert not datasets.are_progress_bars_disabled()  # as before
    finally:
        if not were_shown:
            datasets.disable_progress_bars()
    out, err = capfd.readouterr()
    assert "samples" in out
    assert "\r" not in err
    assert "examples/s" not in err
