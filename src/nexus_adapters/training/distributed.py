"""The processes that train together, through Accelerate, and the trackers that log a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.redaction import without_folders
from nexus_adapters.training.run_folder import identity

_OUTLIVING: list[Any] = []  # process groups


def open_accelerator(config: TrainConfig) -> Accelerator:
    """The processes of a recipe's run.

    Raises `InvalidArgument` for trackers that are not installed, and where processes would share one model.
    """
    wanted = list(config.log.trackers)
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in wanted:
        if name not in available:
            raise InvalidArgument(
                "log.trackers",
                f"installed trackers ({', '.join(available) or 'none is installed'})",
                repr(name),
            )
    accelerator = Accelerator(
        # Said so, or several processes without a GPU would each take themselves for the only one.
        cpu=config.training.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # autocast and loss scale are this package's own
        log_with=wanted or None,
        project_dir=config.output_dir,
    )
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InvalidArgument(
            "accelerate",
            "one process, or several that each hold the whole model",
            accelerator.distributed_type,
        )
    return accelerator


@contextmanager
def told_to_trackers(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """While open, trackers log the run, without its folders. They are closed however it ends."""
    if config.log.trackers:
        settings = {
            key: value
            for key, value in identity(without_folders(config)).items()
            if isinstance(value, int | float | str)
        }
        accelerator.init_trackers(config.log.project, config=settings)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def show_to_trackers(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """Show the validation's pictures to the trackers that take some: TensorBoard and W&B."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({"pictures": np.asarray(sheet)[None]}, step=step, **layout)


def leave_together(accelerator: Accelerator) -> None:
    """End the run on all processes at once.

    torch (2.13) ends a gloo group by waiting for the group's threads while it holds the interpreter. One of
    them may just be giving back a tensor of the last exchange, for which it waits for the interpreter: then
    neither moves on. So the group outlives the run.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        _OUTLIVING.append(torch.distributed.group.WORLD)
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
