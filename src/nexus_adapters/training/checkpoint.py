"""Checkpoints of a training run, which can be killed at any moment. `TrainState` is what they store.

A checkpoint is a folder such as `step-00000200` with safetensors files, `state.json`, and `manifest.json`,
which holds the SHA-256 of every other file. It is written under a temporary name, synced to disk and then
renamed. Pickle is not used. An unfinished or damaged folder is never loaded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nexus_adapters.adapter.saved import check_checkpoint
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
MODULE, AVERAGE, OPTIMIZER = "module", "average", "optimizer"  # safetensors files in a checkpoint


class NotFinite(FloatingPointError):  # noqa: N818  # says what was found
    """A tensor that was to be saved in a checkpoint contains values that are not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """An undamaged checkpoint on disk. `state` is what was saved with the tensors, as JSON types."""

    folder: Path
    step: int
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors saved under `name`, on the CPU; empty if there are none."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
) -> Path:
    """Write `folder/step-N` durably. Older checkpoints are kept until `remove_old_checkpoints`.

    Args:
        folder: the folder of all checkpoints; created if it is missing.
        step: number of finished optimizer steps.
        tensors: file stem -> name -> tensor.
        state: anything else to save, as JSON types.

    Raises:
        NotFinite: if a tensor has values that are not finite; nothing is written.
        OSError: if the disk is full or fails. Earlier checkpoints are unchanged.
    """
    check_finite(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    target = checkpoint_folder(folder, step)
    with replacing_folder(target) as aside:
        for name, content in tensors.items():
            if content:
                save_tensors(aside / f"{name}.safetensors", content)
        (aside / _STATE).write_text(json.dumps({"step": step, **state}, allow_nan=False))
        hashes = {file.name: file_sha256(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1))
    # Newer checkpoints must be damaged, or this step would not have been run again.
    for newer in checkpoint_folders(folder):
        if step_of(newer) > step:
            remove_folder(newer)
    return target


def remove_old_checkpoints(
    folder: Path,
    keep: int,
    keep_every: int = 0,
    best_step: int | None = None,
    is_whole: Callable[[Path], bool] | None = None,
) -> None:
    """Remove checkpoints older than the `keep` newest undamaged ones, except `best_step` and milestones.

    Args:
        folder: the folder of all checkpoints.
        keep: how many to keep; damaged ones do not count.
        keep_every: the checkpoints whose step is a multiple of this are milestones; 0 for none.
        best_step: step of a checkpoint to keep; None for none.
        is_whole: returns whether a checkpoint is undamaged; by default, its files are read.
    """
    found = checkpoint_folders(folder)
    whole = filter(is_whole or (lambda path: damage(path) is None), found)
    newest = list(islice(whole, keep))
    for old in found:
        is_old = len(newest) == keep and step_of(old) < step_of(newest[-1])
        is_milestone = keep_every > 0 and step_of(old) % keep_every == 0
        if is_old and not is_milestone and step_of(old) != best_step:
            remove_folder(old)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest undamaged checkpoint, or None. Warns about each newer damaged one.

    Raises:
        InvalidArgument: named "output_dir", if a newer version of this package wrote it.
    """
    for path in checkpoint_folders(folder):
        reason = damage(path)
        if reason is None:
            return open_checkpoint(path)
        warnings.warn(f"checkpoint: '{path}' is skipped because {reason}", stacklevel=2)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an undamaged checkpoint.

    Raises:
        InvalidArgument: named "output_dir", if a newer version of this package wrote it.
    """
    state = json.loads((path / _STATE).read_bytes())
    check_checkpoint(state, path, "output_dir")
    return Checkpoint(path, int(state["step"]), state)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, as text; None if they are undamaged."""
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
    """Raise `NotFinite`, which names the tensor, unless every floating-point value is finite."""
    for name, content in tensors.items():
        for key, tensor in content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFinite(f"values that are not finite in {name} {key}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, including damaged ones."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=step_of, reverse=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, whether or not it exists."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


@dataclass
class TrainState:
    """The trained module, its optimizer, the fp16 loss scaler and, optionally, the average of the weights."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    bad_steps: int = 0  # in a row, up to the last one

    @classmethod
    def of(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema_decay: float = 0.0,
        use_fp16: bool = False,
    ) -> TrainState:
        """Return the state before the first step."""
        average = _average_of(module, ema_decay) if ema_decay else None
        return cls(module, optimizer, torch.amp.GradScaler(enabled=use_fp16), average)

    @property
    def result(self) -> nn.Module:
        """The module to export: the average if there is one, else the trained module."""
        return self.module if self.average is None else self.average.module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to save: file stem -> tensor name -> tensor."""
        optimizer = {
            f"{index}.{name}": value
            for index, state in self._optimizer_state().items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        average = {} if self.average is None else self.average.module.state_dict()
        return {MODULE: self.module.state_dict(), AVERAGE: average, OPTIMIZER: optimizer}

    def scalars(self) -> dict[str, Any]:
        """Return the rest of the state, as JSON types."""
        optimizer = {
            f"{index}.{name}": value
            for index, state in self._optimizer_state().items()
            for name, value in state.items()
            if not isinstance(value, Tensor)
        }
        averaged = 0 if self.average is None else int(self.average.n_averaged)
        return {
            "optimizer": optimizer,
            "averaged_steps": averaged,
            "loss_scale": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
        }

    def restore(self, checkpoint: Checkpoint, scalars: Mapping[str, Any]) -> None:
        """Load what `tensors` and `scalars` returned from a checkpoint."""
        self.module.load_state_dict(checkpoint.tensors(MODULE))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(AVERAGE))
            self.average.n_averaged.fill_(scalars["averaged_steps"])
        self.scaler.load_state_dict(scalars["loss_scale"])
        self.bad_steps = scalars["bad_steps"]
        self.restore_optimizer(checkpoint, scalars)

    def restore_optimizer(self, checkpoint: Checkpoint, scalars: Mapping[str, Any]) -> None:
        """Load only the optimizer's state from a checkpoint."""
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**checkpoint.tensors(OPTIMIZER), **scalars["optimizer"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _optimizer_state(self) -> dict[int, dict[str, Any]]:
        """Each parameter's state. bitsandbytes nests a part of it in a mapping but also loads it flat."""
        found: dict[int, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            inner = [value for value in state.values() if isinstance(value, Mapping)]
            found[index] = {name: value for name, value in state.items() if not isinstance(value, Mapping)}
            for part in inner:
                found[index] |= part
        return found


def _average_of(module: nn.Module, decay: float) -> AveragedModel:
    following: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch gives it no types
    return AveragedModel(module, multi_avg_fn=following)
