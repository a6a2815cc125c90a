"""Every image that README and the first pages generate shows what its prompt says, where the map has it.

The pages run from top to bottom with the embedded weights, three times, each with other noise. An image whose
scene is not listed here is a failure.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli import main
from nexus_adapters.conditions import extract
from nexus_adapters.embedded.held_out import TestScene, score_images
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import Scene, SceneObject

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/get-started.md")
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_STABLE_DIFFUSION = "stable-diffusion-v1-5/"
INPUTS = {"picture.png", "edges.png"}


def ring_and_triangle(ring, triangle, background):
    objects = (
        SceneObject("ring", ring, "plain", 36, 38, 28, 0),
        SceneObject("triangle", triangle, "plain", 88, 86, 30, 0),
    )
    return Scene(objects, background, light_angle=0, light_strength=0)


# The file that a page writes -> what it should show.
SCENES = {
    "pink-ring.png": ring_and_triangle("pink", "cyan", "green"),
    "red-ring.png": ring_and_triangle("red", "yellow", "green"),
    "yellow-ring.png": ring_and_triangle("yellow", "red", "blue"),
    "orange-ring.png": ring_and_triangle("orange", "blue", "purple"),
    "blue-ring.png": ring_and_triangle("blue", "pink", "yellow"),
}


def run_page(page, seed):
    """Run the page's examples in the current folder: Python from this global seed, commands with this one."""
    names = {}
    torch.manual_seed(seed)
    for language, code in BLOCK.findall((ROOT / page).read_text()):
        if NEEDS_STABLE_DIFFUSION in code:
            continue
        if language == "python":
            exec(compile(code, page, "exec"), names)
            continue
        for command in code.splitlines():
            more = ["--seed", str(seed)] if command.startswith("$ nexus generate ") else []
            assert main([*shlex.split(command.removeprefix("$ nexus ")), *more]) == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", PAGES)
def test_examples_generate_good_images(page, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, seed)
    files = sorted(file for file in tmp_path.glob("*.png") if file.name not in INPUTS)
    assert files
    for file in files:
        scene = SCENES[file.name]
        rendering = render(scene)
        edges = extract("canny", Image.fromarray(rendering.image))
        expected = TestScene(scene, rendering, edges, prompt="")
        found = score_images([np.asarray(Image.open(file))], [expected])
        assert found["binding_color"][0] == found["background"][0] == 1, file.name
        assert found["edge_f1"][0] > 0.75, file.name


def test_every_scene_is_of_an_example():
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert [name for name in SCENES if not any(name in text for text in texts)] == []


def test_get_started_lists_the_words_of_the_embedded_base():
    text = (ROOT / "docs" / "get-started.md").read_text()
    rows = dict(
        re.findall(r"^\| ([a-z ]+) \| ([a-z, ]+) \|$", text.partition("<!-- words -->")[2], re.MULTILINE)
    )
    assert rows == {title: ", ".join(words) for title, words in BUNDLED["embedded"].words.items()}
