"""What README shows runs, in its order, and its links lead to files."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from tests.weights import use_weights, write_tiny

from nexus_adapters.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    """With tiny weights; test_examples.py scores the images of the real ones."""
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    commands = [line for block in blocks("console") for line in block.splitlines() if line]
    for command in commands:
        assert command.startswith("$ nexus ")
        assert main(shlex.split(command.removeprefix("$ nexus "))) == 0
    images = list(tmp_path.glob("*.png"))
    assert len(images) == 3
    assert all(Image.open(file).size == (128, 128) for file in images)


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()
