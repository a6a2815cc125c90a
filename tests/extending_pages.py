"""Every page of docs/extending does what it says: its files, its recipes and its commands, in their order.

Run by tests/test_extending.py in a process of its own, since what a page registers stays registered.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from tests.training.runs import write_images
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from nexus_adapters.cli import main
from nexus_adapters.training.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "docs" / "extending"
PAGES = [file for file in sorted(FOLDER.glob("*.md")) if file.stem != "README"]
PIXART = "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
# What a page asks for that cannot be downloaded here, or takes too long -> what the test puts in its place.
SHORT = """resolution = 256

[training]
max_train_steps = 2
batch_size = 2
gradient_accumulation_steps = 1

[validation]
every_steps = 0
"""
REPLACED = {"base": {PIXART: "tiny-pixart", "resolution = 512\n": SHORT}}
IMPORTED = re.compile(r'(?:--import |imports = \[")([\w.]+\.py)')
BLOCK = re.compile(r'^```(python|toml|console)(?: title="([\w.-]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def tiny_pixart(folder: Path) -> None:
    torch.manual_seed(0)
    words = [(f"▁{word}", -2.0) for word in ("a", "red", "star")]
    letters = [(letter, -4.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    encoder = T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        sample_size=32,
        caption_channels=16,
        cross_attention_dim=16,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    PixArtSigmaPipeline(
        tokenizer, T5EncoderModel(encoder), vae, transformer, DPMSolverMultistepScheduler()
    ).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: a folder of photos. Modules of the pages are imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_images(tmp_path / "photos")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_works(page: Path, folder: Path) -> None:
    if page.stem == "base":
        tiny_pixart(folder / "tiny-pixart")
    text = page.read_text()
    for wanted, put in REPLACED.get(page.stem, {}).items():
        assert wanted in text
        text = text.replace(wanted, put)
    modules = set(IMPORTED.findall(text))  # what commands and recipes import is not run by itself
    ran = 0
    for language, title, content in BLOCK.findall(text):
        if title:
            (folder / title).write_text(content)
        if language == "toml" and title:
            load_recipe(folder / title)
        if language == "console":
            for line in content.splitlines():
                command = shlex.split(line.removeprefix("$ nexus "))
                assert main(command) == 0, line
                ran += 1
        elif language == "python" and title not in modules:
            exec(compile(content, title or page.name, "exec"), {"__name__": "__main__"})
            ran += 1
    assert ran >= 2
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            image.load()
