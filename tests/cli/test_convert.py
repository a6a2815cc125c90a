"""`nexus convert`: formats in, ours out."""

import json

import pytest
import torch
from safetensors import safe_open
from tests.adapter.test_formats import as_original, nexus, same, t2i

from nexus_adapters.adapter.formats import import_adapter
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.cli import main


@pytest.fixture
def source(tmp_path):
    nexus("slim").save_pretrained(tmp_path / "slim")
    (tmp_path / "slim" / "training.json").write_text(json.dumps({"config": {"base.path": "sd/base"}}))
    return tmp_path / "slim"


def test_into_a_file_and_back_into_a_folder(source, tmp_path, capsys):
    file, folder = tmp_path / "slim.safetensors", tmp_path / "again"
    assert main(["convert", str(source), str(file), "--to", "single-file"]) == 0
    assert capsys.readouterr().out == f"{file}: slim, from a NexusAdapter, residual=False\n"
    with safe_open(file, framework="pt") as stored:
        told = stored.metadata()
    assert told["variant"] == "slim"
    assert told["training.base"] == "sd/base"
    assert len(told["training"]) == len(told["sha256"]) == 64
    assert "text width 768" in told["base"]
    assert main(["convert", str(file), str(folder)]) == 0
    assert same(NexusAdapter.from_pretrained(folder), nexus("slim"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_the_start_of_a_slim(tmp_path, capsys):
    torch.save(as_original(t2i()), tmp_path / "t2i.pth")
    options = ["--variant", "slim", "--text-width", "1024", "--residual", "--zero-init", "--seed", "4"]
    assert main(["convert", str(tmp_path / "t2i.pth"), str(tmp_path / "slim"), *options]) == 0
    told = capsys.readouterr()
    assert "slim, from a T2I-Adapter, residual=True" in told.out
    assert "note: norms and attention are new" in told.err
    assert "least squares" in told.err
    expected = import_adapter(
        tmp_path / "t2i.pth", "slim", text_width=1024, residual=True, zero_init=True, seed=4
    ).adapter
    assert same(NexusAdapter.from_pretrained(tmp_path / "slim"), expected)


def test_nothing_is_overwritten(source, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    (tmp_path / "there.safetensors").write_text("mine")
    for dest, options in (("there", []), ("there.safetensors", ["--to", "single-file"])):
        assert main(["convert", str(source), str(tmp_path / dest), *options]) == 2
        assert "nexus convert: error: DEST: expected a new" in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(source), str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x"], "SOURCE: expected a folder or a file; received 'nowhere', which does not exist"),
        (["{source}", "{tmp}/no/x"], "DEST: expected a place in an existing folder"),
        (
            ["{source}", "{tmp}/x.safetensors"],
            "DEST: expected a folder's name; .*--to single-file makes a file",
        ),
        (
            ["{source}", "{tmp}/x", "--to", "single-file"],
            "DEST: expected a file name that ends in .safetensors",
        ),
        (["{source}", "{tmp}/x", "--zero-init"], "--zero-init: expected --residual beside it"),
        (
            ["{source}", "{tmp}/x", "--text-width", "0"],
            "--text-width: expected a positive integer; received 0",
        ),
        (["{tmp}", "{tmp}/x"], "SOURCE: expected weights; received"),
    ],
)
def test_bad_input_is_one_line(source, tmp_path, capsys, arguments, message):
    import re

    given = [argument.format(source=source, tmp=tmp_path) for argument in arguments]
    assert main(["convert", *given]) == 2
    errors = capsys.readouterr().err
    assert re.match(rf"nexus convert: error: {message}", errors)
    assert errors.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def fail(self, folder, **_):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(NexusAdapter, "save_pretrained", fail)
    assert main(["convert", str(source), str(tmp_path / "x")]) == 1
    assert "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim"]
