import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conditions import tiny_models
from tests.data.prepare.sets import digests, image, index, samples, skipped, write_folder

from nexus_adapters.cli import main
from nexus_adapters.cli.prepare_arguments import CAPTIONS, IMAGE_FORMATS, KINDS
from nexus_adapters.conditions import extract
from nexus_adapters.data.prepare import plan, sources


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", 6)


def run(*argv):
    return main(["prepare", *map(str, argv)])


def test_the_lists_of_choices_are_the_engines():
    assert (KINDS, CAPTIONS, IMAGE_FORMATS) == (sources.KINDS, plan.CAPTIONS, plan.IMAGE_FORMATS)


def test_makes_a_set_and_leaves_it_alone_when_run_again(photos, tmp_path, capsys):
    (photos / "002.png").write_bytes(b"broken")
    argv = (photos, "--conditions", "canny,sketch", "--option", "canny.auto=true", "--out", tmp_path / "set")
    assert run(*argv, "--resolution", 24) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'set'}: 5 samples, {tmp_path / 'set' / 'preview.html'} shows some\n"
    assert f"nexus prepare: left out 1 unreadable ({tmp_path / 'set' / 'skipped.jsonl'})\n" in err
    found = samples(tmp_path / "set")
    assert {image(files["jpg"]).size for files in found.values()} == {(24, 24)}
    assert index(tmp_path / "set")["settings"]["conditions"]["canny"]["auto"] is True
    assert skipped(tmp_path / "set")[0]["source"] == "002.png"
    before = digests(tmp_path / "set")
    assert run(*argv, "--resolution", 24) == 0
    assert "was finished already" in capsys.readouterr().err
    assert digests(tmp_path / "set") == before


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
    told = {name: settings[name] for name in ("captions", "image_format", "shard_size", "batch_size", "seed")}
    assert told == {"captions": "random", "image_format": "png", "shard_size": 2, "batch_size": 3, "seed": 3}
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
    for split, count in (("train2017", 6), ("val2017", 2)):
        write_folder(root / split, 0)
        images, annotations = [], []
        for number in range(count):
            identity = 100 + 37 * number
            name = f"{identity:012d}.jpg"
            extract_from = image(encoded_scene(number))
            (extract_from.convert("L") if number == 3 else extract_from).save(root / split / name, quality=95)
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

    from nexus_adapters.data.scene_source import SceneSource

    return encoded(SceneSource(9).load(number).image.crop((0, 0, 128, 96)))


def test_the_coco_recipe(tmp_path):
    """docs/data.md's command, over a miniature of COCO's folder, with tiny models for the default ones."""
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
    assert len(found) == 6
    for number, files in enumerate(found.values()):
        assert set(files) == {
            "jpg", "canny.png", "depth.png", "sketch.png", "segmentation.png", "json", "txt",
        }  # fmt: skip
        assert all(image(files[name]).size == (512, 512) for name in files if name.endswith(("jpg", "png")))
        assert json.loads(files["json"])["captions"] == [f"train2017 {number}, said in way 0"]
        assert json.loads(files["json"])["source"] == f"train2017/{100 + 37 * number:012d}.jpg"
    assert (
        run(
            coco,
            "--split",
            "val2017",
            "--conditions",
            "canny",
            "--captions",
            "random",
            "--out",
            tmp_path / "v",
        )
        == 0
    )
    assert len(samples(tmp_path / "v")) == 2


def coco_command():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    command = next(block for block in page.split("```") if "path/to/coco" in block)
    return command.replace("\\\n", " ").split()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--conditions", "canny,edges"],
            "--conditions: expected names among canny, depth, segmentation, sketch, ",
        ),
        (["--conditions", "canny,canny"], "--conditions: expected canny once; received 'canny,canny'"),
        (
            ["--conditions", "canny", "--option", "low=3"],
            "--option: expected NAME.KEY=VALUE, of canny; received ",
        ),
        (
            ["--conditions", "canny", "--option", "sketch.sigma=3"],
            "--option: expected NAME.KEY=VALUE, of canny",
        ),
        (
            ["--conditions", "canny", "--option", "canny.size=3"],
            "--option canny.options: expected those of canny (low, high",
        ),
        (
            ["--conditions", "canny", "--option", "canny.low=x"],
            "--option canny.low: expected a number; received 'x'",
        ),
        (
            ["--conditions", "depth", "--option", "depth.model=no/such"],
            "--option depth.model: expected a folder or the Hub id of a model for depth estimation; received",
        ),
        (["--conditions", "canny", "--workers", "0"], "--workers: expected at least 1; received 0"),
        (
            ["--conditions", "canny", "--ray-address", "auto"],
            "--ray-address: expected --engine ray beside it",
        ),
        (["--conditions", "canny", "--gpus-each", "1"], "--gpus-each: expected --engine ray beside it"),
        (["--conditions", "canny", "--aspect-buckets"], "--aspect-buckets: expected --resolution beside it"),
        (["--conditions", "canny", "--min-side", "-1"], "--min-side: expected at least 0; received -1"),
        (["--conditions", "canny", "--resolution", "0"], "--width: expected at least 1 pixel; received 0"),
        (
            ["--conditions", "canny", "--min-side", "9999"],
            "SOURCE: expected a usable sample; received none of 6",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(photos, tmp_path, capsys, argv, message):
    assert run(photos, *argv, "--out", tmp_path / "set") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nexus prepare: error: {message}")
    assert err.count("\n") == 1


def test_lists_of_urls_are_not_fetched(tmp_path, capsys):
    (tmp_path / "urls.txt").write_text("https://example.com/a.jpg\n")
    assert run(tmp_path / "urls.txt", "--conditions", "canny", "--out", tmp_path / "set") == 2
    assert "SOURCE: expected images, not a list of their URLs" in (err := capsys.readouterr().err)
    assert "img2dataset" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_once_and_the_same_command_goes_on(tmp_path, number, status):
    argv = [
        "scenes", "--count", "400", "--conditions", "sketch", "--workers", "2", "--shard-size", "20",
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


def test_an_installation_without_the_extra_is_told(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    for name in list(sys.modules):
        if name.startswith("nexus_adapters.data.prepare.run"):
            monkeypatch.delitem(sys.modules, name)
    assert run(photos, "--conditions", "canny", "--out", tmp_path / "set") == 2
    assert (
        "pip install 'nexus-adapters[data]'; received an installation without filelock"
        in capsys.readouterr().err
    )
