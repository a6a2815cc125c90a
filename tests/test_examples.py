"""Every image that README and the guides generate shows what its prompt says, where the map has it.

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
PAGES = (
    "README.md",
    "docs/get-started.md",
    "docs/how-to/control-strength.md",
    "docs/how-to/inpainting.md",
    "docs/how-to/several-controls.md",
)
BLOCK = re.compile(r"^```(python|console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_STABLE_DIFFUSION = ("stable-diffusion-v1-5/", "mask_image=")
INPUTS = {"picture.png", "edges.png", "photo.png", "depth.png"}


def circle_and_ring(circle, ring, background):
    """What the examples draw: a circle of radius 28 (0.92 of the scene's radius) and a ring of radius 30."""
    objects = (
        SceneObject("circle", circle, "plain", 34.5, 36.5, 28.5 / 0.92, 0),
        SceneObject("ring", ring, "plain", 93.5, 88.5, 30.5, 0),
    )
    return Scene(objects, background, light_angle=0, light_strength=0)


ORANGE_AND_BLUE = circle_and_ring("orange", "blue", "cyan")
# The file that a page writes -> what it should show.
SCENES = {
    "orange-circle.png": ORANGE_AND_BLUE,
    "yellow-circle.png": circle_and_ring("yellow", "red", "purple"),
    "cyan-circle.png": circle_and_ring("cyan", "orange", "purple"),
    "blue-circle.png": circle_and_ring("blue", "pink", "yellow"),
    "pink-circle.png": circle_and_ring("pink", "cyan", "green"),
    "default.png": ORANGE_AND_BLUE,
    "looser.png": ORANGE_AND_BLUE,
    "composition.png": ORANGE_AND_BLUE,
    "closer.png": ORANGE_AND_BLUE,
    "faithful.png": ORANGE_AND_BLUE,
    "faithful-07.png": ORANGE_AND_BLUE,
    "composition-cli.png": ORANGE_AND_BLUE,
    "faithful-cli.png": ORANGE_AND_BLUE,
    "repainted.png": circle_and_ring("yellow", "pink", "blue"),
    "both.png": ORANGE_AND_BLUE,
    "edges-only.png": ORANGE_AND_BLUE,
    "halves.png": ORANGE_AND_BLUE,
    "both-cli.png": ORANGE_AND_BLUE,
}
# Images that should not follow the map -> why.
LOOSE = dict.fromkeys(
    ("prompt-first.png", *(f"star-{scale}.png" for scale in (1.0, 0.6, 0.3, 0.0))),
    "shows what happens when the prompt contradicts the map",
)


def run_page(page, seed):
    """Run the page's examples in the current folder: Python from this global seed, commands with this one."""
    names = {}
    torch.manual_seed(seed)
    for language, code in BLOCK.findall((ROOT / page).read_text()):
        if any(words in code for words in NEEDS_STABLE_DIFFUSION):
            continue
        if language == "python":
            exec(compile(in_other_noise(code, seed), page, "exec"), names)
            continue
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command.removeprefix("$ "))
            if words[:2] == ["nexus", "generate"]:
                assert main([*words[1:], "--seed", str(seed)]) == 0


def in_other_noise(code, seed):
    return code.replace("manual_seed(0)", f"manual_seed({seed})")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page", PAGES)
def test_examples_generate_good_images(page, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, seed)
    files = sorted(file for file in tmp_path.glob("*.png") if file.name not in {*INPUTS, *LOOSE})
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
