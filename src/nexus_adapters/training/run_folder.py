"""What a run keeps in its folder: checkpoints, and a log without rows of steps that were lost."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from accelerate import Accelerator

from nexus_adapters.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from nexus_adapters.training.output import with_defaults
from nexus_adapters.training.state import TrainState

CHECKPOINTS, LOG = "checkpoints", "log.jsonl"


@runtime_checkable
class Observer(Protocol):
    """What looks at a run between its steps. Its state, of JSON's types, is in every checkpoint."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended the run."""

    def after_step(self, step: int) -> dict[str, Any]:
        """Called on every process with the number of finished steps; what it found, for the log."""

    def state(self) -> dict[str, Any]:
        """What to go on from."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class RunFolder:
    """Saving and logging for one run; only the main process writes."""

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        identity: Mapping[str, object],
        accelerator: Accelerator,
        observer: Observer | None,
    ) -> None:
        self.folder = folder
        self.state = state
        self.identity = json.loads(json.dumps(identity))  # as a checkpoint gives it back
        self.accelerator = accelerator
        self.observer = observer
        self._saved_step = -1
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; the number of finished steps.

        ValueError where it is another run's.
        """
        with warnings.catch_warnings():
            if not self.accelerator.is_main_process:
                warnings.simplefilter("ignore")  # one process tells of damaged ones
            checkpoint = latest_checkpoint(self.folder / CHECKPOINTS)
        step = 0
        if checkpoint is not None:
            self._check_same_run(checkpoint)
            self.state.restore(checkpoint, checkpoint.state["train"])
            if self.observer is not None:
                self.observer.restore(checkpoint.state["observer"])
            self._saved_step = step = checkpoint.step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _forget_rows_after(step, self.folder / LOG)
        return step

    def save(self, step: int, keep: int) -> None:
        """Write a checkpoint, unless this step has one."""
        if step == self._saved_step:
            return
        if self.accelerator.is_main_process:
            observed = {} if self.observer is None else self.observer.state()
            state = {"train": self.state.scalars(), "observer": observed, "identity": self.identity}
            save_checkpoint(self.folder / CHECKPOINTS, step, self.state.tensors(), state, keep)
        self._saved_step = step
        self.accelerator.wait_for_everyone()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log; what is not finite becomes null."""
        if self.accelerator.is_main_process:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with (self.folder / LOG).open("a") as stream:
                stream.write(json.dumps(finite, allow_nan=False) + "\n")
            numbers = {name: value for name, value in finite.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=row["step"])

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        stored, now = checkpoint.state["identity"], self.identity
        before = {k: v for k, v in with_defaults(stored).items() if k in stored or k in now}
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"output_dir: expected a run with {key} {before.get(key)!r}, as '{checkpoint.folder}' "
                    f"is of; received {now.get(key)!r}. Go on as before, or in another folder"
                )


def memory_gib(device: torch.device) -> float:
    """What this process holds: the most so far on a GPU, else now in the machine's memory.

    Pages of the cache's files are not counted, where the system tells them apart: it may drop them at will.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    info = psutil.Process().memory_info()
    held: int = info.rss - getattr(info, "shared", 0)
    return round(held / 2**30, 2)


def read_rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without those that a kill or a loss of power has cut short."""
    rows = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _forget_rows_after(step: int, log: Path) -> None:
    """Drop the rows of steps that a killed run took after its last checkpoint: they are taken again."""
    if not log.exists():
        return
    rows = read_rows(log)
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    if kept == log.read_text(errors="replace"):
        return
    partial = log.with_name(f"{log.name}.unfinished")
    partial.write_text(kept)
    os.replace(partial, log)
