"""A study that runs in seconds."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import tiny
from tests.training.runs import recipe, write_images

from nexus_adapters.study.plan import Cell, Study
from nexus_adapters.study.results import load_result, save_result

PLAN = """
recipe = "recipe.toml"
folder = "{root}/study"
compare_to = "t2i"

[evaluate]
base.path = "{root}/base"
data = {{ path = "{root}/images", resolution = 64, count = 3 }}
num_inference_steps = 2
guidance_scale = 2.0
batch_size = 3

[views.empty]
prompts = "empty"

[methods.t2i]
train.adapter.method = "t2i"

[methods.prime]

[methods."prime+per_branch"]
trained_as = "prime"
evaluate.policy = "per_branch"

[[cells]]
conditions = ["canny"]
methods = ["base", "t2i", "prime", "prime+per_branch"]

[[cells]]
conditions = ["canny"]
methods = ["prime", "t2i"]
seeds = [0, 1]
"""


def write_world(root: Path) -> Path:
    """Base, images and recipe."""
    from tomli_w import dumps

    tiny.sd15().save_pretrained(root / "base")
    write_images(root / "images")
    content = recipe(root, root / "unused", training__max_train_steps=2)
    del content["output_dir"]
    content["adapter"] = {"method": "prime"}
    (root / "recipe.toml").write_text(dumps(content))
    return root


def write_plan(root: Path, name: str = "tiny", text: str = PLAN) -> Path:
    path = root / f"{name}.toml"
    path.write_text(text.format(root=root))
    return path


def study(root: Path, **options: str) -> Study:
    return Study(write_plan(root, **options))


def change_settings(results: Path, cell: Cell, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the settings that a stored result has."""
    result = load_result(results, cell)
    settings = deepcopy(dict(result.settings))
    change(settings)
    save_result(results, cell, replace(result, settings=settings))


def snapshot(folder: Path) -> dict[Path, int]:
    """File -> when it was last changed; locks excepted."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
