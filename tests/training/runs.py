"""Tiny recipes that train in a second."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tests import tiny

from nexus_adapters.training import loop
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run import train_adapter

CAPTIONS = ("a red star", "a blue ring", "a green cat", "photo of a dog")


def write_images(folder: Path, count: int = 14) -> Path:
    """An image folder with captions, 64x64 pixels."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(count):
        tiny.image(seed=100 + index).save(folder / f"{index:02d}.png")
        lines.append(f'{{"file_name": "{index:02d}.png", "text": "{CAPTIONS[index % 4]}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def recipe(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over `root/base` and `root/images`; `changes` by key with "__" for the dot."""
    content: dict[str, Any] = {
        "output_dir": str(out),
        "base": {"path": str(root / "base")},
        "adapter": {"method": "prime"},
        "data": {"path": str(root / "images"), "resolution": 64},
        "cache": {"folder": str(root / "cache")},
        "loss": {"condition_dropout": 0.2, "prompt_dropout": 0.2},
        "training": {
            "max_train_steps": 4,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "mixed_precision": "no",  # as on machines whose processors multiply bfloat16
        },
        "checkpoint": {"every_steps": 2},
        "validation": {"every_steps": 0, "guidance_scale": 2.0, "num_inference_steps": 2},
        "log": {"every_steps": 1},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        table = content
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return content


def config(root: Path, out: Path, **changes: Any) -> TrainConfig:
    return parse_config(recipe(root, out, **changes))


def run(root: Path, out: Path, **changes: Any) -> Path:
    return train_adapter(config(root, out, **changes))


def stopped_after(step: int, number: int = signal.SIGTERM) -> Any:
    """In place of `run.train`: lets a signal come in the midst of the step after so many."""

    def train(state: Any, losses: Any, *args: Any, **kwargs: Any) -> int:
        def signalled(done: int) -> Any:
            if done == step:
                os.kill(os.getpid(), number)
            return losses(done)

        return loop.train(state, signalled, *args, **kwargs)

    return train


# Three epochs of 32, or nearly; `data.path` has at least 33 samples.
LONG = {
    "training__max_train_steps": 24,
    "training__batch_size": 2,
    "training__gradient_accumulation_steps": 2,
    "training__ema_decay": 0.8,
    "data__count": 33,
    "checkpoint__every_steps": 5,
}


def same_to_the_bit(out: Path, other: Path, step: int) -> bool:
    """Whether weights, average and optimizer after so many steps, and each step's loss, are equal."""
    for name in ("module", "optimizer", "average"):
        file = f"checkpoints/step-{step:08d}/{name}.safetensors"
        ours, theirs = load_file(out / file), load_file(other / file)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return losses(out) == losses(other)


def losses(out: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def grey(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))
