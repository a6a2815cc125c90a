"""Tiny recipes that train in less than a second, and a method that shows tests what it trains."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests import tiny

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.arguments import base_geometry
from nexus_adapters.methods.feature_method import FeatureMethod
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run import train_adapter

# The least UNet that a Nexus adapter fits. A T2I-Adapter needs SD 1.5's four levels.
SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 1,
}
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
            "max_train_steps": 2,
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
    """Train; without a log unless `changes` ask for one, since the plot of it takes as long as the rest."""
    return train_adapter(config(root, out, **{"log__every_steps": 1000} | changes))


class Watched(FeatureMethod):
    """Trains a Prime. Register it in a `METHODS.temporary()`.

    Attributes:
        base: of the last forward pass.
        denoiser: the last one that an adapter was built for.
        adapter: the last one that was built.
        passes: forward passes with gradients since the adapter was built.
        before_pass: called before each of them.
        after_pass: features -> features.
    """

    label = "Watched"

    def __init__(self) -> None:
        super().__init__("watched")
        self.base: Any = None
        self.denoiser: Any = None
        self.adapter: Any = None
        self.passes = 0
        self.before_pass: Callable[[], object] = lambda: None
        self.after_pass: Callable[[Any], Any] = lambda features: features

    def build(self, base: Any, denoiser: Any, options: Any) -> Any:
        self.denoiser, self.passes = denoiser, 0
        self.adapter = NexusAdapter.for_geometry(base_geometry(base), "prime")
        return self.adapter

    def denoiser_arguments(self, module: Any, batch: Any, noisy: Any, t: Any, base: Any) -> dict[str, Any]:
        self.base = base
        if torch.is_grad_enabled():  # not in a validation
            self.passes += 1
            self.before_pass()
        found = super().denoiser_arguments(module, batch, noisy, t, base)
        return found | {"features": self.after_pass(found["features"])}


def weightless(base: Path, folder: Path) -> Path:
    """A copy of a base with empty files for weights: whoever reads them fails."""
    shutil.copytree(base, folder)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    return folder


@contextmanager
def stopped_in(watched: Watched, step: int, number: int = signal.SIGTERM) -> Iterator[None]:
    """While open, `LONG` runs get a signal in the midst of the step after `step` finished ones."""

    def stop() -> None:
        if watched.passes == 2 * step + 1:  # of two parts
            os.kill(os.getpid(), number)

    watched.before_pass = stop
    try:
        yield
    finally:
        watched.before_pass = lambda: None


# Two epochs in one process, nearly five in two; with the fixture `watched`.
LONG: dict[str, Any] = {
    "adapter__method": "watched",
    "log__every_steps": 1,
    "training__max_train_steps": 12,
    "training__batch_size": 1,
    "training__gradient_accumulation_steps": 2,
    "training__ema_decay": 0.8,
    "data__count": 11,
    "validation__every_steps": 6,
    "validation__images": 0,
    "validation__samples": 1,
    "checkpoint__every_steps": 5,
}


def same_to_the_bit(out: Path, other: Path, step: int) -> bool:
    """Whether weights, average and optimizer after so many steps, and all that was logged, are equal."""
    for name in ("module", "optimizer", "average"):
        file = f"checkpoints/step-{step:08d}/{name}.safetensors"
        ours, theirs = load_file(out / file), load_file(other / file)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return logged(out) == logged(other)


def logged(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without what the machine decides."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    machine = ("step_s", "samples_per_s", "memory_gib")
    return [{name: value for name, value in row.items() if name not in machine} for row in rows]
