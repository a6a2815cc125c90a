"""The processes that train together, through Accelerate, and the trackers that log a run."""

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
    """Whether this is the process that prints, of those that train together; known before they are opened."""
    return int(os.environ.get("RANK", "0")) == 0


def check_trackers(wanted: Sequence[str]) -> None:
    """`InvalidArgument` for trackers that are not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in wanted:
        if name not in available:
            raise InvalidArgument(
                "log.trackers",
                f"installed trackers ({', '.join(available) or 'none is installed'})",
                repr(name),
            )


def open_accelerator(output_dir: Path, use_cpu: bool, trackers: Sequence[str]) -> Accelerator:
    """The processes that train together, as `accelerate launch` or torchrun started them.

    Args:
        output_dir: where trackers that write files put them.
        use_cpu: also where there is CUDA.
        trackers: those that will log the run.

    Raises `InvalidArgument` for trackers that are not installed, and where processes would share one model.
    """
    check_trackers(trackers)
    accelerator = Accelerator(
        # Explicit, or several processes without a GPU would each take themselves for the only one.
        cpu=use_cpu or not torch.cuda.is_available(),
        mixed_precision="no",  # autocast and loss scale are this package's own
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
    """While open, the trackers of `log` record the run. They are closed however it ends.

    `settings`: of the run; those that are numbers or strings are recorded with it.
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
    """Log the sheet of validation images to the trackers that take images: TensorBoard and W&B."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **layout)


def leave_together(accelerator: Accelerator) -> None:
    """End the run on all processes at once.

    torch (2.13) destroys a gloo group by waiting for its threads while it holds the interpreter lock. A
    thread that is just releasing a tensor of the last exchange waits for the same lock: a deadlock. So the
    group is never destroyed.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        _UNCOLLECTED.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def check_shared(name: str, folder: Path, accelerator: Accelerator) -> None:
    """`InvalidArgument` on every process unless all of them see the same folder."""
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
