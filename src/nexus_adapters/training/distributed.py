"""Distributed training with Accelerate, and the trackers that log a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import LogOptions

_UNCOLLECTED: list[Any] = []  # process groups of finished runs


def is_main_process() -> bool:
    """Return whether this is the main process. It can be called before `open_accelerator`."""
    return int(os.environ.get("RANK", "0")) == 0


def check_trackers(wanted: Sequence[str]) -> None:
    """Raise `InvalidArgument` for trackers that are not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in wanted:
        if name not in available:
            raise InvalidArgument(
                "log.trackers",
                f"installed trackers ({', '.join(available) or 'none are installed'})",
                repr(name),
            )


def open_accelerator(output_dir: Path, use_cpu: bool, trackers: Sequence[str]) -> Accelerator:
    """Return the accelerator of the processes that `accelerate launch` or torchrun started.

    Args:
        output_dir: the folder for trackers that write files.
        use_cpu: use the CPU even if CUDA is available.
        trackers: names of the trackers that will log the run.

    Raises:
        InvalidArgument: if a tracker is not installed, or if the processes would share one model.
    """
    check_trackers(trackers)
    accelerator = Accelerator(
        # Must be explicit, or each of several processes without a GPU would act as if it were alone.
        cpu=use_cpu or not torch.cuda.is_available(),
        mixed_precision="no",  # this package does autocast and loss scaling itself
        log_with=list(trackers) or None,
        project_dir=str(output_dir),
    )
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InvalidArgument(
            "accelerate",
            "one process, or several that each hold the whole model",
            accelerator.distributed_type,
        )
    return accelerator


@contextmanager
def open_trackers(log: LogOptions, settings: Mapping[str, Any], accelerator: Accelerator) -> Iterator[None]:
    """While open, the trackers in `log` record the run. They are closed however the run ends.

    `settings` are the run's settings; numbers and strings among them are recorded.
    """
    if log.trackers:
        plain = {key: value for key, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(log.project, config=plain)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def log_images(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """Log the sheet of validation images to the trackers that accept images: TensorBoard and W&B."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **layout)


def leave_together(accelerator: Accelerator) -> None:
    """End the run on all processes at once.

    When torch 2.13 destroys a gloo group, it waits for the group's threads while holding the interpreter
    lock. A thread that is releasing a tensor of the last exchange waits for the same lock, which is a
    deadlock. So the group is never destroyed.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        _UNCOLLECTED.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def check_shared(name: str, folder: Path, accelerator: Accelerator) -> None:
    """Raise `InvalidArgument` on every process unless all of them see the same folder."""
    if accelerator.num_processes == 1:
        return
    (number,) = broadcast_object_list([os.getpid()])  # the main process's
    token = folder / f".shared-{number}"
    if accelerator.is_main_process:
        token.touch()
    accelerator.wait_for_everyone()
    seen = all(gather_object([token.exists()]))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        token.unlink()
    if not seen:
        raise InvalidArgument(name, "a folder that all processes share", f"'{folder}'")
