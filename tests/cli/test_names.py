"""A name of an adapter means the same weights in every command."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.png_settings import read_settings
from tests.training.runs import write_images
from tests.weights import NAMES

from nexus_adapters import load_adapter
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli import main
from nexus_adapters.methods import method_of

# One that is not the default; the others are tried with `pytest -m full`.
ALWAYS = (("depth", "slim"),)
CASES = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.full, id="-".join(case)) for case in NAMES
]


@pytest.fixture(scope="module", autouse=True)
def weights(module_weights):
    return module_weights


def by_info(condition, name, tmp_path, capsys):
    assert main(["info", name, "--condition", condition]) == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("sha256 ")]
    return line.split()[1]


def by_generate(condition, name, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "map.png")
    argv = ["generate", "--prompt", "a", "--map", tmp_path / "map.png", "--out", tmp_path / "a.png"]
    argv += ["--condition", condition, "--adapter", name, "--steps", 1]
    assert main(list(map(str, argv))) == 0
    return read_settings(tmp_path / "a.png")["adapter_sha256"]


def by_evaluate(condition, name, tmp_path):
    argv = ["evaluate", "--adapter", name, "--condition", condition, "--out", tmp_path / "evaluation"]
    assert main([*map(str, argv), "--count", "1", "--steps", "1"]) == 0
    content = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    return content["methods"][name]["sha256"]


def started_from(condition, name, tmp_path):
    """The weights of a training that starts from the adapter and learns nothing."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'output_dir = "{tmp_path / "run"}"\n'
        f'adapter = {{ method = "{name}", start_from = "{name}" }}\n'
        f'data = {{ kind = "scenes", condition = "{condition}", count = 2, resolution = 128 }}\n'
        f'cache = {{ folder = "{tmp_path / "cache"}" }}\n'
        "training = { max_train_steps = 1, batch_size = 1, gradient_accumulation_steps = 1, "
        "learning_rate = 1e-30, weight_decay = 0.0 }\n"
        "validation = { every_steps = 0 }\n"
    )
    assert main(["train", str(recipe)]) == 0
    return load_file(tmp_path / "run" / "adapter" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("condition", "name"), CASES)
def test_every_command_resolves_a_name_to_the_same_weights(condition, name, tmp_path, capsys):
    saved = find_saved(name, condition)
    expected = saved.sha256()
    assert saved.path == BUNDLED["embedded"].adapter(name, condition)
    assert by_info(condition, name, tmp_path, capsys) == expected
    assert by_generate(condition, name, tmp_path) == expected
    assert by_evaluate(condition, name, tmp_path) == expected
    file = load_file(saved.path / "diffusion_pytorch_model.safetensors")
    adapter = load_adapter(name, condition)
    assert method_of(adapter).name == name
    trained = started_from(condition, name, tmp_path)
    assert adapter.state_dict().keys() == file.keys() == trained.keys()
    for key, stored in file.items():
        assert torch.equal(adapter.state_dict()[key], stored.float())
        torch.testing.assert_close(trained[key], stored.float(), rtol=0, atol=1e-20)


@pytest.mark.full
@pytest.mark.parametrize("condition", ["canny", "depth", "sketch"])
def test_the_demo_shows_the_weights_of_these_names(condition, tmp_path):
    assert main(["demo", "--condition", condition, "--out", str(tmp_path), "--steps", "1"]) == 0
    report = json.loads((tmp_path / "demo.json").read_text())
    shown = {name: digest for name, digest in report["weights_sha256"].items() if name != "base"}
    assert {"prime", "slim"} <= set(shown)
    assert shown == {name: find_saved(name, condition).sha256() for name in shown}


def test_all_of_them_differ():
    digests = [find_saved(name, condition).sha256() for condition, name in NAMES]
    assert len(set(digests)) == len(NAMES)


def test_the_shipped_ones_have_the_hash_that_info_prints(monkeypatch, capsys, tmp_path):
    """Of every name, from the files of the package; nothing is loaded."""
    monkeypatch.undo()
    for condition, name in NAMES:
        assert len(by_info(condition, name, tmp_path, capsys)) == 64


# A base whose tokenizer cannot read prompts is refused by every command that would generate or train with it.


@pytest.fixture(scope="module")
def without_vocabulary(tmp_path_factory):
    """A base whose tokenizers have no vocabulary."""
    root = tmp_path_factory.mktemp("without-vocabulary")
    tiny.sd15().save_pretrained(root / "base")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (root / "base" / "tokenizer" / name).unlink(missing_ok=True)
    tiny.adapter(tiny.unet()).save_pretrained(root / "adapter")
    write_images(root / "images", 4)
    Image.new("RGB", (64, 64)).save(root / "map.png")
    return root


def command(name, root, out):
    if name == "train":
        recipe = out / "recipe.toml"
        recipe.write_text(
            f'output_dir = "{out / "run"}"\nbase.path = "{root / "base"}"\n'
            f'data = {{ path = "{root / "images"}", resolution = 64 }}\n'
        )
        return [recipe]
    shared = ["--base", root / "base", "--adapter", root / "adapter"]
    if name == "generate":
        return ["--prompt", "a", "--map", root / "map.png", "--out", out / "a.png", *shared]
    return ["--kind", "folder", "--data", root / "images", "--resolution", 64, "--out", out / "e", *shared]


@pytest.mark.parametrize("name", ["generate", "evaluate", "train"])
def test_a_base_without_a_tokenizers_files_is_refused(name, without_vocabulary, tmp_path, capfd):
    capfd.readouterr()
    assert main([name, *map(str, command(name, without_vocabulary, tmp_path))]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    argument = "base.path" if name == "train" else "--base"
    assert lines[0].startswith(f"nexus {name}: error: {argument}: "), lines
    assert f"'{without_vocabulary / 'base' / 'tokenizer'}'" in lines[0]
    assert "tokenizer.json" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == (["recipe.toml"] if name == "train" else [])


def test_with_these_files_it_is_used(without_vocabulary, tmp_path, capsys):
    """So it was they alone."""
    root = shutil.copytree(without_vocabulary, tmp_path / "whole")
    tiny.tokenizer().save_pretrained(root / "base" / "tokenizer")
    out = tmp_path / "out"
    out.mkdir()
    assert main(["generate", *map(str, command("generate", root, out)), "--steps", "1"]) == 0
