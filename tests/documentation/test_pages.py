"""The code blocks of README and of all pages in docs/ work.

The blocks of a page run in their order, in one namespace and a folder of their own: Python, the commands
of `nexus`, and blocks with a title, which are files. Models are tiny and random (`stand_ins.py`). What is not
run is listed here with the reason; a block that is neither run nor listed fails, and so does an entry
without a block.
"""

import dataclasses
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from tests.documentation import page_names
from tests.documentation.blocks import PAGES, Block, blocks_of
from tests.documentation.commands import check, commands
from tests.documentation.stand_ins import write_stand_ins
from tests.weights import use_weights, write_tiny

from nexus_adapters.adapter.blocks import BLOCKS
from nexus_adapters.bases import BASES
from nexus_adapters.cli import main
from nexus_adapters.conditions import EXTRACTORS
from nexus_adapters.evaluation.config import EvaluationRecipe
from nexus_adapters.methods import METHODS
from nexus_adapters.metrics import METRICS
from nexus_adapters.study.plan import StudyPlan
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.recipe import load_recipe

# Pages whose commands of `nexus` run, since later blocks need what they write. On others they are parsed.
RUN = {
    "README.md",
    "docs/get-started.md",
    "docs/extending/base.md",
    "docs/extending/block.md",
    "docs/extending/condition.md",
    "docs/extending/method.md",
    "docs/extending/metric.md",
    "docs/how-to/control-strength.md",
    "docs/how-to/convert-t2i-adapter.md",
    "docs/how-to/evaluate.md",
    "docs/how-to/inpainting.md",
    "docs/how-to/several-controls.md",
    "docs/how-to/train-on-photos.md",
    "docs/how-to/your-own-model.md",
}
# What a Python block or, on a page of `RUN`, a command contains -> why it is not run. It is still parsed.
NOT_RUN = {
    "nexus prepare unseen": "needs the photos of the page on photos",
    "--data unseen-128": "needs the run of the page on photos",
    "--clip openai/clip-vit-base-patch32": "needs vision models, and COCO",
    "--base dreamshaper.safetensors": "the configs of a single file come from the Hub",
    'load_base("dreamshaper.safetensors"': "the configs of a single file come from the Hub",
    "pipe.load_lora_weights(": "needs LoRA weights",
    'from_pretrained("you/nexus-canny-sd15")': "needs the adapter that a GPU trains in hours",
}
APP = "http://127.0.0.1:7860"
ON_CPU = {'"cuda"': '"cpu"'}
SMALL = {"(512, 512)": "(64, 64)"}
# A page -> what is shorter or smaller in the test.
REPLACED: dict[str, dict[str, str]] = {
    "docs/extending/base.md": {
        "resolution = 512\n": "resolution = 256\n\n[training]\nmax_train_steps = 2\nbatch_size = 2\n"
        "gradient_accumulation_steps = 1\n\n[validation]\nevery_steps = 0\n"
    },
    "docs/get-started.md": ON_CPU,
    "docs/how-to/convert-t2i-adapter.md": ON_CPU | SMALL | {"torch.float16": "torch.float32"},
    "docs/how-to/evaluate.md": {
        "--count 20 --steps 8": "--count 2 --steps 2",
        "--count 100 --steps 8": "--count 2 --steps 2",
    },
    "docs/how-to/inpainting.md": SMALL
    | {"512, 512, pad": "64, 64, pad", "(256, 256, 512, 512)": "(32, 32, 64, 64)"},
    "docs/how-to/train-on-photos.md": {
        "range(60)": "range(12)",
        "number < 40": "number < 10",
        "max_train_steps = 200": "max_train_steps = 2",
        "guidance_scale = 2.0 ": "guidance_scale = 2.0\nsamples = 2\nimages = 0 ",
        "photo-7": "photo-1",
        "--resolution 512": "--resolution 64",
    },
    "docs/how-to/web-app.md": {"seed=7,": "seed=7,\n    steps=1,"},
    "docs/how-to/your-own-model.md": SMALL
    | {"(1024, 1024)": "(64, 64)", "(96, 96, 416, 416)": "(12, 12, 52, 52)"},
    "docs/reference/training.md": {
        '"training.max_train_steps=100"': '"training.max_train_steps=1", "training.batch_size=2", '
        '"data.count=4", "validation.every_steps=0"'
    },
}
# A page -> what its blocks take for granted. Guides define what they use.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/extending/base.md": page_names.pixart,
    "docs/extending/condition.md": page_names.photos,
    "docs/how-to/publish.md": page_names.trained,
    "docs/reference/control.md": page_names.control,
    "docs/reference/data.md": page_names.data,
    "docs/reference/evaluation.md": page_names.evaluation,
}
SHELL = {"", "sh", "bash", "console"}
NOT_CODE = {"text", "json", "bibtex", "csv", "mermaid", "nginx"}
REGISTRIES = (BASES, BLOCKS, EXTRACTORS, METHODS, METRICS)
SECTIONS = {
    field.name for kind in (TrainConfig, EvaluationRecipe, StudyPlan) for field in dataclasses.fields(kind)
} | {"project"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> Iterator[Path]:
    """A reader's folder. What a page registers or imports is forgotten afterwards."""
    use_weights(monkeypatch, weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for pipeline in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline):
        call = unwrap(pipeline.__call__)  # pages leave out the number of steps, which is 50
        monkeypatch.setattr(
            call, "__defaults__", tuple(4 if each == 50 else each for each in call.__defaults__)
        )
    before = set(sys.modules)
    with ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(registry.temporary())
        yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def text_of(page: str) -> str:
    text = PAGES[page].read_text()
    for wanted, put in REPLACED.get(page, {}).items():
        assert wanted in text
        text = text.replace(wanted, put)
    return text


def reason(text: str) -> str:
    return next((why for part, why in NOT_RUN.items() if part in text), "")


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page, PAGES[page].read_text()))])
def test_the_blocks_of_a_page_work(page: str, folder: Path) -> None:
    text = text_of(page)
    write_stand_ins(text, folder)
    names: dict[str, Any] = {"__name__": "__main__", **(GIVEN[page]() if page in GIVEN else {})}
    torch.manual_seed(0)
    with app_for(text) as text:
        for block in blocks_of(page, text):
            try:
                work(block, names, folder, text)
            except Exception as error:
                error.add_note(f"in {block.place}")
                raise


@contextmanager
def app_for(text: str) -> Iterator[str]:
    """Run the web app for a page whose code calls it: the text, with the app's address."""
    if f'Client("{APP}")' not in text:
        yield text
        return
    from nexus_adapters.app.models import Models
    from nexus_adapters.app.page import build
    from nexus_adapters.app.server import running

    with running(lambda: build(Models())) as address:
        yield text.replace(APP, address)


def work(block: Block, names: dict[str, Any], folder: Path, page: str) -> None:
    """Run or check a block."""
    if block.title:
        (folder / block.title).write_text(block.text)
    if block.language == "python":
        is_module = f'"{block.title}"' in page.replace(f'title="{block.title}"', "") or (
            f"--import {block.title}" in page
        )
        if not (block.title and is_module) and not reason(block.text):
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
    elif block.language == "toml":
        unknown = set(tomllib.loads(block.text)) - SECTIONS
        assert not unknown, f"no keys of a recipe, an evaluation or a plan: {unknown}"
        if block.title:
            load_recipe(folder / block.title)
    elif block.language in SHELL:
        for words in commands(block.text):
            check(words)
            if words[0] == "nexus" and block.page in RUN and not reason(" ".join(words)):
                assert main(words[1:]) == 0, words
    else:
        assert block.language in NOT_CODE, f"{block.place}: neither run nor listed: {block.language}"


def test_every_entry_is_about_a_page() -> None:
    assert {*RUN, *REPLACED, *GIVEN} <= PAGES.keys()
    texts = [
        text
        for page in PAGES
        for block in blocks_of(page, PAGES[page].read_text())
        for text in (block.text, *(" ".join(words) for words in commands_of(block)))
    ]
    for part in NOT_RUN:
        assert any(part in text for text in texts), part


def commands_of(block: Block) -> list[list[str]]:
    return list(commands(block.text)) if block.language in SHELL else []
