"""Checkpoints of a training run, which survive a kill at any moment; `TrainState` is what they store.

A checkpoint is a folder `step-00000200` with safetensors files, `state.json`, and `manifest.json`, which
holds the SHA-256 of every other file. It is written under a temporary name, synced to disk and then renamed.
No pickle. An unfinished or damaged folder is never loaded.
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
    """A tensor that a checkpoint was to hold has values that are not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """An undamaged checkpoint on disk. `state` is what was saved with the tensors, of JSON's types."""

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
) -> Path:
    """Write `folder/step-N` durably. Older checkpoints stay until `remove_old_checkpoints`.

    Args:
        folder: of all checkpoints; created if it is missing.
        step: finished optimizer steps.
        tensors: file stem -> name -> tensor.
        state: of JSON's types.

    Raises:
        NotFinite: where a tensor is not finite; nothing is written.
        OSError: where the disk is full or fails. Earlier checkpoints stay as they were.
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
    # Newer checkpoints are damaged, or this step would not have been taken again.
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
    """Remove what is older than the `keep` newest undamaged checkpoints, but `best_step`'s and milestones.

    Args:
        folder: of all checkpoints.
        keep: how many stay; damaged ones do not count.
        keep_every: milestones are the checkpoints whose step is a multiple of it; 0 for none.
        best_step: of a checkpoint that stays.
        is_whole: whether a checkpoint is undamaged; by default its files are read.
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
    """The newest undamaged checkpoint, with a warning for each newer damaged one. None if there is none.

    `InvalidArgument` named "output_dir" where a newer version of this package wrote it.
    """
    for path in checkpoint_folders(folder):
        reason = damage(path)
        if reason is None:
            return open_checkpoint(path)
        warnings.warn(f"checkpoint: '{path}' is skipped, since {reason}", stacklevel=2)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """An undamaged checkpoint. `InvalidArgument` named "output_dir" where a newer version wrote it."""
    state = json.loads((path / _STATE).read_bytes())
    check_checkpoint(state, path, "output_dir")
    return Checkpoint(path, int(state["step"]), state)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if all are as they were written."""
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
    """`NotFinite`, which names the tensor, unless every floating-point value is finite."""
    for name, content in tensors.items():
        for key, tensor in content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NotFinite(f"values that are not finite in {name} {key}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, damaged or not, newest first."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=step_of, reverse=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, if there is one."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


@dataclass
class TrainState:
    """The trained module, its optimizer, the loss scale of fp16 and, if wanted, the weights' average."""

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
        """The state before the first step."""
        average = _average_of(module, ema_decay) if ema_decay else None
        return cls(module, optimizer, torch.amp.GradScaler(enabled=use_fp16), average)

    @property
    def result(self) -> nn.Module:
        """The module that the run results in: the average, if there is one."""
        return self.module if self.average is None else self.average.module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensor name -> tensor."""
        optimizer = {
            f"{index}.{name}": value
            for index, state in self._optimizer_state().items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        average = {} if self.average is None else self.average.module.state_dict()
        return {MODULE: self.module.state_dict(), AVERAGE: average, OPTIMIZER: optimizer}

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, of JSON's types."""
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
        """Continue from a checkpoint of `tensors` and `scalars`."""
        self.module.load_state_dict(checkpoint.tensors(MODULE))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(AVERAGE))
            self.average.n_averaged.fill_(scalars["averaged_steps"])
        self.scaler.load_state_dict(scalars["loss_scale"])
        self.bad_steps = scalars["bad_steps"]
        self.restore_optimizer(checkpoint, scalars)

    def restore_optimizer(self, checkpoint: Checkpoint, scalars: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's optimizer state alone."""
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**checkpoint.tensors(OPTIMIZER), **scalars["optimizer"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _optimizer_state(self) -> dict[int, dict[str, Any]]:
        """Each parameter's state. bitsandbytes nests a part in a mapping, and also loads it flat."""
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
