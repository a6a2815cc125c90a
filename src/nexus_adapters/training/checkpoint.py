"""Checkpoints that survive a kill at any moment: written aside, synced to disk, checked, and then renamed.

A checkpoint is a folder `step-00000200` with safetensors files, `state.json`, and `manifest.json`, which
holds the SHA-256 of every other file. No pickle. An unfinished or damaged folder is never taken for one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_adapters.adapter.saved import check_checkpoint
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import (
    file_sha256,
    remove_folder,
    remove_unfinished,
    replacing_folder,
    save_tensors,
)

MANIFEST = "manifest.json"
_STATE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk. `state` is what was saved with the tensors, of JSON's types."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU; empty where there were none."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    keep: int,
) -> Path:
    """Write `folder/step-N`, durably, and only then remove all but the `keep` newest checkpoints.

    Args:
        folder: of all checkpoints; made where it is missing.
        step: finished optimizer steps.
        tensors: file stem -> name -> tensor.
        state: anything that JSON holds.
        keep: at least 1.

    Raises:
        InvalidArgument: where a tensor is not finite; nothing is written.
        OSError: where the disk is full or fails. The checkpoints that were there stay as they were.
    """
    check_finite(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    target = folder / f"{_PREFIX}{step:08d}"
    with replacing_folder(target) as aside:
        for name, content in tensors.items():
            if content:
                save_tensors(aside / f"{name}.safetensors", content)
        (aside / _STATE).write_text(json.dumps({"step": step, **state}, allow_nan=False))
        hashes = {file.name: file_sha256(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1))
    # Newer ones are those that were damaged, or this step would not have been taken.
    newest_first = _checkpoints(folder)
    for old in (
        *newest_first[: newest_first.index(target)],
        *newest_first[newest_first.index(target) + keep :],
    ):
        remove_folder(old)
    return target


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a warning for each newer one that is not. None where none is.

    `InvalidArgument` named "output_dir" where a newer version of this package wrote it.
    """
    for path in _checkpoints(folder):
        reason = damage(path)
        if reason is None:
            state = json.loads((path / _STATE).read_bytes())
            check_checkpoint(state, path, "output_dir")
            return Checkpoint(path, int(state["step"]), state)
        warnings.warn(f"checkpoint: '{path}' is skipped, since {reason}", stacklevel=2)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where all are as they were written."""
    try:
        hashes: Mapping[str, str] = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
        for name, expected in hashes.items():
            if file_sha256(checkpoint / name) != expected:
                return f"{name} has changed since it was written"
        return None if _STATE in hashes else f"its {MANIFEST} does not name {_STATE}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """InvalidArgument, which names the tensor, unless every floating-point value is finite."""
    for name, content in tensors.items():
        for key, tensor in content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument("checkpoint", "finite values", f"others in {name} {key}")


def _checkpoints(folder: Path) -> list[Path]:
    """Whole or not, newest first."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)
