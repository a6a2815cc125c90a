"""What a run keeps in its folder: checkpoints, and a log without rows of steps that were lost."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from nexus_adapters.adapter.saved import CHECKPOINT_FORMAT
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import append_json_lines, read_json_lines, write_text
from nexus_adapters.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from nexus_adapters.training.output import differing, with_defaults
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
        """What a resumed run needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave."""


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

        InvalidArgument where it is another run's.
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
            state = {
                "format_version": CHECKPOINT_FORMAT,
                "train": self.state.scalars(),
                "observer": observed,
                "identity": self.identity,
                "adapter": adapter_config(self.state.module),
            }
            save_checkpoint(self.folder / CHECKPOINTS, step, self.state.tensors(), state, keep)
        self._saved_step = step
        self.accelerator.wait_for_everyone()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log; what is not finite becomes null."""
        if self.accelerator.is_main_process:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            append_json_lines(self.folder / LOG, [finite])
            numbers = {name: value for name, value in finite.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=row["step"])

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        before, now = checkpoint.state["identity"], self.identity
        key = differing(before, now)
        if key is not None:
            raise InvalidArgument(
                "output_dir",
                f"a run with {key} {with_defaults(before).get(key)!r}, as '{checkpoint.folder}' has",
                repr(with_defaults(now).get(key)),
                "Resume with the settings of before, or train in another folder",
            )


def adapter_config(module: nn.Module | Any) -> dict[str, Any]:
    """A module's config as JSON gives it back, so that a checkpoint loads on its own; {} if it has none."""
    to_json = getattr(module, "to_json_string", None)
    return {} if to_json is None else dict(json.loads(to_json()))


def memory_gib(device: torch.device) -> float:
    """What this process holds: the most so far on a GPU, else now in the machine's memory.

    Pages of the cache's files are not counted, where the system tells them apart: it may drop them at will.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    info = psutil.Process().memory_info()
    held: int = info.rss - getattr(info, "shared", 0)
    return round(held / 2**30, 2)


def _forget_rows_after(step: int, log: Path) -> None:
    """Drop the rows of steps that a killed run took after its last checkpoint: they are taken again."""
    if not log.exists():
        return
    rows = read_json_lines(log, dict)
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    if kept.encode() != log.read_bytes():
        write_text(log, kept)
