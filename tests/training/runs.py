"""Tiny recipes that train in a second."""

from pathlib import Path
from typing import Any

from PIL import Image
from tests import tiny

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
        "adapter": {"method": "prime", "residual": True},
        "data": {"path": str(root / "images"), "resolution": 64},
        "cache": {"folder": str(root / "cache")},
        "loss": {"condition_dropout": 0.2, "prompt_dropout": 0.2},
        "training": {
            "max_train_steps": 4,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "schedule": "cosine",
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


def grey(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))
