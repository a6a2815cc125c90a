"""The end of a run: a folder that `from_pretrained` loads, with a card that says how it came about."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily
from safetensors import SafetensorError
from torch import nn

from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import read_json_lines, remove_unfinished, replacing_folder
from nexus_adapters.methods import Method
from nexus_adapters.training.card import loss_plot, model_card
from nexus_adapters.training.config import HubOptions, TrainConfig
from nexus_adapters.training.output import ADAPTER, FINISHED, identity
from nexus_adapters.training.public import without_folders
from nexus_adapters.training.run_folder import LOG

IMAGES = "images"


def export(adapter: Any, method: Method, config: TrainConfig, steps: int, samples: int) -> Path:
    """Write `output_dir/adapter`, whole or not at all: float32 weights, README.md, curves, last pictures."""
    output = Path(config.output_dir)
    rows = read_json_lines(output / LOG, dict)
    record = {
        "steps": steps,
        "stopped_early": steps < config.training.max_train_steps,
        "samples": samples,
        "config": identity(without_folders(config)),
    }
    remove_unfinished(output)
    with replacing_folder(output / ADAPTER) as folder:
        # diffusers' own `to` warns of parts to keep in float32: here all are.
        whole: Any = nn.Module.to(adapter, torch.float32)
        try:
            whole.save_pretrained(folder, safe_serialization=True)
        except SafetensorError as error:  # among them: no space left on device
            raise OSError(f"output_dir: cannot write the adapter ({error})") from error
        (folder / FINISHED).write_text(json.dumps(record, indent=1) + "\n")
        if any("val_loss" in row or "loss" in row for row in rows):
            loss_plot(rows, folder / "loss.png")
        sheets = sorted((output / IMAGES).glob("step-*.png"))
        if sheets:
            shutil.copyfile(sheets[-1], folder / "samples.png")
        (folder / "README.md").write_text(
            model_card(adapter, method, config, record, rows, folder), encoding="utf-8"
        )
    return output / ADAPTER


def push(folder: Path, hub: HubOptions) -> str:
    """Upload the finished adapter's folder; its address.

    Raises OSError where the Hub cannot be reached or refuses; the adapter stays where it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=hub_token())
    try:
        api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=hub.repo_id, folder_path=folder, commit_message="Add the adapter")
        )
    except Exception as error:  # the client and what lies below it have many of their own
        reason = one_line(error)
        raise OSError(f"hub.repo_id: cannot upload to '{hub.repo_id}' ({reason})") from error


def check_hub(hub: HubOptions) -> None:
    """`InvalidArgument` for what is no repository's name, and where the environment has no token."""
    try:
        validate_repo_id(hub.repo_id)
    except HFValidationError as error:
        raise InvalidArgument("hub.repo_id", "name/repository", repr(hub.repo_id)) from error
    if hub_token() is None:
        raise InvalidArgument(
            "HF_TOKEN", hint="Uploading to the Hub needs a token in this environment variable"
        )


def hub_token() -> str | None:
    """From the environment alone: it is in no file, and so in none of ours."""
    return os.environ.get("HF_TOKEN")
