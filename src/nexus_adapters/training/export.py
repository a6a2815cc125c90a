"""The end of a run: a folder that `from_pretrained` loads, with a card that says how it came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_adapters.training.card import loss_plot, model_card
from nexus_adapters.training.checkpoint import replacing_folder
from nexus_adapters.training.config import HubOptions, TrainConfig
from nexus_adapters.training.output import ADAPTER, FINISHED, identity

IMAGES, LOG = "images", "log.jsonl"


def export(adapter: Any, config: TrainConfig, steps: int, samples: int) -> Path:
    """Write `output_dir/adapter`, whole or not at all: float32 weights, README.md, curves, last pictures."""
    output = Path(config.output_dir)
    rows = (
        [json.loads(line) for line in (output / LOG).read_text().splitlines()]
        if (output / LOG).exists()
        else []
    )
    record = {
        "steps": steps,
        "stopped_early": steps < config.training.max_train_steps,
        "samples": samples,
        "config": identity(config),
    }
    with replacing_folder(output / ADAPTER) as folder:
        # diffusers' own `to` warns of parts to keep in float32: here all are.
        nn.Module.to(adapter, torch.float32).save_pretrained(folder, safe_serialization=True)
        (folder / FINISHED).write_text(json.dumps(record, indent=1) + "\n")
        if any("val_loss" in row or "loss" in row for row in rows):
            loss_plot(rows, folder / "loss.png")
        sheets = sorted((output / IMAGES).glob("step-*.png"))
        if sheets:
            shutil.copyfile(sheets[-1], folder / "samples.png")
        (folder / "README.md").write_text(model_card(adapter, config, record, rows, folder), encoding="utf-8")
    return output / ADAPTER


def push(folder: Path, hub: HubOptions) -> str:
    """Upload the finished adapter's folder; its address. The Hub's client finds the token itself."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
    return str(api.upload_folder(repo_id=hub.repo_id, folder_path=folder, commit_message="Add the adapter"))
