"""The engine of many machines: Ray Data, with a worker in each of its actors."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nexus_adapters.data.prepare.folder import SetFolder
from nexus_adapters.data.prepare.plan import Plan
from nexus_adapters.data.prepare.worker import Worker
from nexus_adapters.errors import InvalidArgument


def run_ray(
    plan: Plan,
    folder: SetFolder,
    step: str,
    shards: Iterable[int],
    progress: Callable[[int], None],
    workers: int = 1,
    address: str | None = None,
    gpus_each: float = 0,
) -> None:
    """Do a step ("survey" or "write") for these shards, as `local.run_local` does.

    Each actor opens the source and loads the models once. Source and folder must be on a disk that all
    machines see. A worker that dies is started anew, and its shards are done again: a shard is there whole or
    not at all, so nothing is there twice.

    Args:
        plan: what to make.
        folder: where.
        step: the method of `Worker`.
        shards: by number.
        progress: is told how many samples have been gone through since it was told last.
        workers: actors.
        address: of a running cluster, such as "auto"; None uses the one that this process is connected to,
            or else starts one on this machine.
        gpus_each: of each actor, 0 for none; a fraction shares one.

    Raises:
        InvalidArgument: where Ray is missing.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InvalidArgument(
            "engine",
            "the ray package",
            "an installation that lacks it",
            "Run pip install 'nexus-adapters[ray]'",
        ) from error
    numbers = [{"shard": shard, "samples": len(plan.indices(shard))} for shard in shards]
    if not numbers:
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a default to come
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    is_ours = not ray.is_initialized()
    if is_ours:
        with sigterm_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        done = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
            _Actor,
            fn_constructor_args=(plan, folder, step),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus_each or None,
        )
        for row in done.iter_rows():
            progress(int(row["samples"]))
    finally:
        if is_ours:
            ray.shutdown()


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back to whoever had it: `ray.init` takes it for good, and exits with status 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray, too, leaves it alone in others
            signal.signal(signal.SIGTERM, before)


class _Actor:
    """A worker, for as long as its process lives."""

    def __init__(self, plan: Plan, folder: SetFolder, step: str) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._do = getattr(Worker(plan, folder), step)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            self._do(int(shard))
        return batch
