"""Where the embedded models are found, and what users read where they are not installed."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image
from tests.refusals import refused
from tests.weights import hide_weights, use_weights

from nexus_adapters import load_adapter, load_base, load_embedded
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bundled import BUNDLED, DISTRIBUTION, weights_folder
from nexus_adapters.cli import COMMANDS, main
from nexus_adapters.embedded.pipeline import embedded_clip
from nexus_adapters.errors import MISSING

ROOT = Path(__file__).parents[1]
INSTALL = "pip install ./packages/nexus-adapters-embedded"
LOADERS = {
    "load_embedded": load_embedded,
    "load_base": load_base,
    "load_adapter": lambda: load_adapter("prime"),
    "load_adapter of another condition": lambda: load_adapter("slim", "depth", base="embedded"),
    "find_saved": lambda: find_saved("prime"),
    "embedded_clip": embedded_clip,
    "the base's folder": lambda: BUNDLED["embedded"].folder,
}
# OUT stands for a folder that does not exist, MAP for an image.
COMMAND_LINES = {
    "demo": ["--out", "OUT"],
    "generate": ["--prompt", "a red star", "--map", "MAP", "--out", "OUT.png"],
    "evaluate": ["--adapter", "prime", "--out", "OUT"],
    "train": ["embedded-canny", "--set", "output_dir=OUT"],
    "study": [str(ROOT / "benchmarks" / "plans" / "miniature.toml"), "--out", "OUT"],
    "convert": ["prime", "OUT"],
    "info": ["prime"],
    "app": ["--port", "0"],
}


def test_every_embedded_model_is_installed():
    base = BUNDLED["embedded"]
    assert base.folder.is_relative_to(weights_folder())
    for condition, names in base.adapters.items():
        for name in names:
            assert base.adapter(name, condition).is_relative_to(weights_folder() / condition)


@pytest.mark.parametrize("name", LOADERS)
def test_without_the_distribution_loaders_say_what_to_install(name, monkeypatch):
    hide_weights(monkeypatch)
    with refused("the package nexus-adapters-embedded", MISSING, hint=INSTALL):
        LOADERS[name]()


def test_what_they_say_to_install_is_in_a_clone():
    project = tomllib.loads((ROOT / INSTALL.split()[-1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == DISTRIBUTION


def test_every_command_that_uses_an_embedded_model_is_covered():
    assert set(COMMANDS) - set(COMMAND_LINES) == {"extract", "prepare"}


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_without_the_distribution_commands_say_what_to_install(command, monkeypatch, tmp_path, capsys):
    hide_weights(monkeypatch)
    out, image = tmp_path / "out", tmp_path / "map.png"
    Image.new("RGB", (128, 128)).save(image)
    given = [text.replace("OUT", str(out)).replace("MAP", str(image)) for text in COMMAND_LINES[command]]
    assert main([command, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert INSTALL in errors[0]


def test_without_the_distribution_names_are_still_known(monkeypatch):
    hide_weights(monkeypatch)
    with refused("adapter", "'prim', which does not exist", hint="prime, slim, prime-paper, slim-paper, t2i"):
        find_saved("prim")
    with refused("adapter", "'t2i'", expected="prime, slim for depth"):
        find_saved("t2i", "depth")


@pytest.mark.parametrize(
    ("load", "file"),
    [
        (load_embedded, "canny/prime-residual/config.json"),
        (load_base, "base/model_index.json"),
        (embedded_clip, "clip/config.json"),
    ],
)
def test_an_incomplete_distribution_names_the_missing_file(load, file, monkeypatch, tmp_path):
    use_weights(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load()
    assert f"'{tmp_path / file}'" in str(caught.value)
    assert "\n" not in str(caught.value)
