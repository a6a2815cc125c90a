"""`nexus train`: what it prints, and with which status it ends."""

import json

import pytest
from PIL import Image
from tests import tiny
from tests.training.runs import config, write_images

from nexus_adapters.cli import main
from nexus_adapters.training import run as module
from nexus_adapters.training.loop import DivergedError, Stopped
from nexus_adapters.training.recipe import dump_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    tiny.sd15().save_pretrained(root / "base")
    write_images(root / "images")
    return root


@pytest.fixture
def recipe(root, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(dump_config(config(root, tmp_path / "out")))
    return path


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_trains_and_says_where_the_adapter_is(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--set", "training.max_train_steps=2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'adapter'}\n"
    assert (tmp_path / "out" / "adapter" / "config.json").is_file()
    before = files(tmp_path / "out")
    assert main(["train", str(recipe), "--set", "training.max_train_steps=2"]) == 0
    assert "finished after 2 steps" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_a_dry_run_reports_the_training_and_writes_nothing(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for expected in ("prime", "47,592", "14", "adamw", "cosine", "1.00e-02"):
        assert expected in out
    assert len(out[out.index("\ndata ") :].splitlines()) == 2  # the end of the line before, and one of them
    assert not (tmp_path / "out").exists()


def test_measuring_is_a_dry_run_too(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--measure"]) == 0
    assert "s per step, measured with random weights" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def mixed(root, tmp_path_factory):
    """Sixteen images: two cannot be read, three have no words, four are small, five have long captions."""
    folder = write_images(tmp_path_factory.mktemp("mixed") / "images", count=16)
    for index in range(4, 8):
        tiny.image(40, 48).save(folder / f"{index:02d}.png")
    (folder / "00.png").write_bytes(b"no picture")
    texts = ["a cat", "lone \ud800", "", " ", "\n", *["a red star on a blue ring " * 9] * 5, *["a cat"] * 6]
    rows = [{"file_name": f"{index:02d}.png", "text": text} for index, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_dry_run_shows_what_the_data_have(recipe, mixed, tmp_path, capsys):
    settings = ["--set", f"data.path={mixed}", "--set", "training.max_train_steps=5000"]
    assert main(["train", str(recipe), "--dry-run", *settings]) == 0
    out, err = capsys.readouterr()
    data = [line.strip() for line in out[out.index("\ndata ") :].splitlines() if line]
    assert str(mixed) in data[0]
    assert "16 samples" in data[0]
    assert "64x64" in data[0]
    parts = ("2 of 16", "3 of 14", "5 of 14", "4 of 14")  # unreadable, empty, cut, small
    assert [part in line for part, line in zip(parts, data[1:], strict=True)] == [True] * 4
    assert "(image 1, captions 1)" in data[1]
    assert "12 tokens" in data[3]
    assert "truncated" not in err
    assert "training.max_train_steps" in err  # 625 epochs
    assert not (tmp_path / "out").exists()


def test_a_preview_shows_samples_as_training_reads_them(recipe, mixed, tmp_path, capsys):
    page = tmp_path / "page.html"
    argv = ["train", str(recipe), "--preview", str(page), "--set", f"data.path={mixed}"]
    assert main(argv) == 0
    assert "16 samples" in capsys.readouterr().out  # of the dry run
    text = page.read_text(encoding="utf-8")
    assert 8 <= text.count("<figure>") <= 12
    assert text.count("<img ") == 2 * text.count("<figure>")
    assert "a red star on a blue ring" in text
    assert "</span>" in text
    assert not (tmp_path / "out").exists()
    before = page.read_bytes()
    assert main(argv) == 2
    assert "--preview" in capsys.readouterr().err
    assert page.read_bytes() == before


@pytest.mark.parametrize("name", ["page.txt", "missing/page.html", "folder.html"])
def test_where_no_preview_can_go_is_refused_before_any_work(recipe, tmp_path, capsys, name):
    (tmp_path / "folder.html").mkdir()
    assert main(["train", str(recipe), "--preview", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("nexus train: error: --preview: ")


def test_a_run_that_diverged_is_no_bad_input(recipe, monkeypatch, capsys):
    def diverged(config):
        raise DivergedError("gradients are not finite")

    monkeypatch.setattr(module, "train_adapter", diverged)
    assert main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err == "nexus train: error: gradients are not finite\n"


@pytest.mark.parametrize("number", [2, 15])
def test_a_run_that_was_stopped_says_so_by_its_status(recipe, monkeypatch, capsys, number):
    def stopped(config):
        raise Stopped(number, 7)

    monkeypatch.setattr(module, "train_adapter", stopped)
    assert main(["train", str(recipe)]) == 128 + number
    assert "after step 7, which is saved; run the same command to resume" in capsys.readouterr().err


def test_the_hub_is_asked_for_by_an_option(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train_adapter", lambda config: seen.append(config))
    main(["train", str(recipe), "--push-to-hub", "me/adapter"])
    assert seen[0].hub.repo_id == "me/adapter"


def bad(recipe, capsys, *settings):
    """The one line on stderr of a command that fails."""
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", str(recipe), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line.removeprefix("nexus train: error: ")


# Settings, the key that is named, and what else the line says.
BAD = {
    "an unknown key": (["training.batchsize=2"], "training.batchsize", "Did you mean training.batch_size"),
    "no such base": (["base.path=nowhere/to/be/found"], "base.path", "'nowhere/to/be/found'"),
    "a config for a base that is no file": (["base.config=x"], "base.config", "'x'"),
    "no such data": (["data.path=nowhere"], "data.path", "'nowhere'"),
    "a missing column": (["data.caption_column=title"], "data.caption_column", "'title'"),
    "an odd resolution": (["data.resolution=60"], "data.resolution", "multiple of 64"),
    "a batch larger than the data": (["training.batch_size=15"], "training.batch_size", "at most 14"),
    "an adapter that is none": (["adapter.start_from=nowhere"], "adapter.start_from", "'nowhere'"),
    "a tracker that is not there": (['log.trackers=["comet_ml"]'], "log.trackers", "comet_ml"),
    "an option that the extractor has not": (
        ["data.extractor.lo=3"],
        "data.extractor",
        "canny (low, high, auto), got 'lo'",
    ),
    "an option of another type": (["data.extractor.low=a"], "data.extractor.low", "a number, got 'a'"),
    "an optimizer that needs CUDA": (["training.optimizer=adamw8bit"], "training.optimizer", "CUDA"),
    "weights that are not there": (["base.variant=fp16"], "base.path", "fp16"),
    "early stopping without pictures": (
        ["validation.early_stop_patience=2"],
        "validation.early_stop_patience",
        "got 2",
    ),
    "fp16 on a CPU": (
        ["training.mixed_precision=fp16", "training.device=cpu"],
        "training.mixed_precision",
        "auto, no or bf16 on a CPU, got 'fp16'",
    ),
    "an option of another method": (["adapter.method=t2i"], "adapter.groups", "'t2i'"),
    "an option of Slim": (["adapter.groups=2"], "adapter.groups", "got 2"),
    "no such method": (["adapter.method=nothing"], "adapter.method", "'nothing'"),
    "no such block": (["adapter.block=nothing"], "adapter.block", "'nothing'"),
    "no such module": (['imports=["nothing_there"]'], "imports", "'nothing_there'"),
    "no setting": (["seed"], "--set", "'seed'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_model_is_loaded(recipe, monkeypatch, capsys, case):
    settings, name, shown = BAD[case]
    monkeypatch.setattr(module, "load_encoders", lambda *_: pytest.fail("a model was loaded"))
    line = bad(recipe, capsys, *settings)
    assert line.startswith(f"{name}: ")
    assert shown in line


def test_no_recipe(tmp_path, capsys):
    line = bad(tmp_path / "none.toml", capsys)
    assert line.startswith("RECIPE: ")
    assert f"'{tmp_path / 'none.toml'}'" in line


def test_an_empty_data_set(recipe, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = bad(recipe, capsys, f"data.path={tmp_path / 'empty'}")
    assert line.startswith("data.path: ")
    assert f"'{tmp_path / 'empty'}'" in line


def test_an_output_folder_of_something_else(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    line = bad(recipe, capsys)
    assert line.startswith("output_dir: ")
    assert "thesis.txt" in line
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_kill_while_the_config_was_written_stands_in_nobodys_way(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished-config.toml-0123abcd").write_text("output_")
    (tmp_path / "out" / ".lock").touch()
    assert main(["train", str(recipe), "--set", "training.max_train_steps=1"]) == 0


def test_an_output_folder_of_another_run(recipe, tmp_path, capsys):
    main(["train", str(recipe), "--set", "training.max_train_steps=1"])
    before = files(tmp_path / "out")
    line = bad(recipe, capsys, "seed=5", "training.max_train_steps=1")
    assert line.startswith("output_dir: ")
    assert "seed=5" in line
    assert files(tmp_path / "out") == before


def test_an_output_folder_in_use(recipe, tmp_path, capsys):
    from nexus_adapters.files import locked

    with locked(tmp_path / "out", "out"):
        line = bad(recipe, capsys)
    assert line.startswith("output_dir: ")
    assert f"'{tmp_path / 'out'}'" in line


@pytest.fixture
def paired(tmp_path):
    """Eight images with maps of their names, of which as many as `damage` says cannot be used."""
    folder = write_images(tmp_path / "data" / "images", count=8)
    (tmp_path / "data" / "conditioning").mkdir()

    def damage(bad):
        for index, image in enumerate(sorted(folder.glob("*.png"))):
            file = tmp_path / "data" / "conditioning" / image.name
            kinds = [Image.new("F", (64, 64)), tiny.image(64, 20)]  # a mode that no lines have, an aspect
            given = kinds[index % 2] if index < bad else tiny.image(64, 64)
            given.save(file, format="TIFF" if given.mode == "F" else "PNG")
        return tmp_path / "data"

    for number, image in enumerate(sorted(folder.glob("*.png"))):
        image.with_suffix(".txt").write_text(f"picture {number}")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    return damage


@pytest.mark.parametrize(
    ("bad", "error"), [(1, ""), (3, "data.max_bad_fraction: "), (8, "data: expected readable samples")]
)
def test_a_dry_run_refuses_the_maps_that_training_refuses(recipe, paired, capsys, bad, error):
    settings = [f"data.path={paired(bad)}", "data.image_column=images", "data.condition_column=conditioning"]
    argv = [part for setting in settings for part in ("--set", setting)]
    status = main(["train", str(recipe), "--dry-run", *argv])
    out, err = capsys.readouterr()
    assert status == (2 if error else 0)
    text = next(line for line in err.splitlines() if "error" in line) if error else out
    assert error in text
    assert f"{bad} of 8" in text
    assert "conditioning/00.png'" in text  # the map, not its image


def test_a_batch_whose_bytes_cannot_be_counted_is_refused(recipe, capsys):
    settings = ["data.resolution=16384", f"training.batch_size={2**32 - 1}"]
    settings += ["data.kind=table", "data.path=some/one"]  # on the Hub, so that its size is not known
    argv = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", str(recipe), "--dry-run", *argv]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "training.batch_size: expected a batch of 16384x16384 pixel images" in line


@pytest.mark.parametrize(
    ("command", "argument"), [("train", "RECIPE"), ("study", "PLAN"), ("evaluate", "CONFIG")]
)
def test_a_folder_or_nothing_in_place_of_a_toml_file(tmp_path, capsys, command, argument):
    for path, why in ((tmp_path, "is not a file"), (tmp_path / "no.toml", "does not exist")):
        assert (
            main([command, str(path), *(() if command == "train" else ("--out", str(tmp_path / "out")))]) == 2
        )
        error = capsys.readouterr().err
        assert f"{argument}: expected a TOML file" in error
        assert f", got '{path}', which {why}" in error
