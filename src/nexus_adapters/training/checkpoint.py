"""Checkpoints that survive a kill at any moment: written aside, synced to disk, checked, and then renamed.

A checkpoint is a folder `step-00000200` with safetensors files, `state.json`, and `manifest.json`, which
holds the SHA-256 of every other file. No pickle. An unfinished or damaged folder is never taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
_STATE = "state.json"
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"  # a folder that is being written, or deleted


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk. `state` is what was saved beside the tensors, of JSON's types."""

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
        ValueError: where a tensor is not finite; nothing is written.
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
        shutil.rmtree(_put_aside(old), ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a warning for each newer one that is not. None where none is."""
    for path in _checkpoints(folder):
        reason = damage(path)
        if reason is None:
            state = json.loads((path / _STATE).read_bytes())
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
    """ValueError, which names the tensor, unless every floating-point value is finite."""
    for name, content in tensors.items():
        for key, tensor in content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"checkpoint: expected finite values; received others in {name} {key}")


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. OSError, with the reason, where it cannot be written."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, file)
    except SafetensorError as error:  # among them: no space left on device
        raise OSError(f"checkpoint: expected room for '{file}'; received an error ({error})") from error


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and otherwise nothing.

    A `target` that is there is put aside before and removed after: it is never half one and half the other.
    """
    aside = target.with_name(f"{_UNFINISHED}{target.name}-{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        _sync_folder(aside)
        replaced = _put_aside(target) if target.exists() else None
        try:
            os.rename(aside, target)
        except BaseException:
            if replaced is not None:
                os.rename(replaced, target)
            raise
        _sync_folder(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def file_sha256(file: Path) -> str:
    """In hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Whole or not, newest first."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def _sync_folder(folder: Path) -> None:
    """So that the names in it survive a loss of power, where the system can do that (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_aside(folder: Path) -> Path:
    """Renamed, so that a deletion that is interrupted leaves no half folder under its name."""
    aside = folder.with_name(f"{_UNFINISHED}{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, aside)
    return aside


def remove_unfinished(folder: Path) -> None:
    """What a kill has left in the midst of writing or deleting."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
