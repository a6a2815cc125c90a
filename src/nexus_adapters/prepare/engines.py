"""The engines that make a prepared set: local processes, or Ray actors on many machines."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for_sentinels
from typing import Any

from nexus_adapters.data.prepared_set import SetFolder
from nexus_adapters.packages import missing_package
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.worker import Worker

_POLL_S = 0.2  # seconds between progress reports
_AHEAD = 2  # shards that are handed out per process


def run_local(
    plan: Plan,
    folder: SetFolder,
    step: str,
    shards: Iterable[int],
    progress: Callable[[int], None],
    workers: int = 1,
) -> None:
    """Run a step of `Worker` ("survey" or "write") for these shards in local processes.

    Args:
        plan: the set to make.
        folder: the set's folder.
        step: the method of `Worker`.
        shards: the numbers of the shards.
        progress: called with the number of samples processed since its last call.
        workers: number of processes; with 1, the step runs in this process.

    Raises:
        OSError: if a process was killed, for example because memory ran out.
    """
    if workers == 1:
        with _one_opencv_thread():
            worker = Worker(plan, folder, progress)
            for shard in shards:
                getattr(worker, step)(shard)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start, (plan, folder, counter, workers)) as pool:
        try:
            reported = 0
            for _ in _completed(pool, step, iter(shards), workers * _AHEAD):
                reported = _report(counter, reported, progress)
            _report(counter, reported, progress)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps because memory ran out. Run the command again to "
                "resume, with fewer workers if it happens again"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _completed(pool: ProcessPoolExecutor, step: str, shards: Iterator[int], ahead: int) -> Iterator[None]:
    """Hand out shards, a few in advance, and yield often enough to report progress."""
    running: set[Future[None]] = set()
    while True:
        for shard in islice(shards, ahead - len(running)):
            running.add(pool.submit(_do, step, shard))
        if not running:
            return
        done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        yield


def _report(counter: Any, reported: int, progress: Callable[[int], None]) -> int:
    now = int(counter.value)
    progress(now - reported)
    return now


_worker: Worker  # set by _start in each worker process


def _start(plan: Plan, folder: SetFolder, counter: Any, workers: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    _end_with_parent()

    def count(samples: int) -> None:
        with counter.get_lock():
            counter.value += samples

    _share_cores(plan, workers)
    _worker = Worker(plan, folder, count)


def _do(step: str, shard: int) -> None:
    getattr(_worker, step)(shard)


def _end_with_parent() -> None:
    """Exit if the main process is killed, or this one would keep writing into the folder of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _share_cores(plan: Plan, workers: int) -> None:
    import cv2

    cv2.setNumThreads(1)
    if plan.uses_models():
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Limit OpenCV to one thread: more are no faster for such images and take cores of other processes."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


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
    """Run a step of `Worker` for these shards in Ray actors.

    Each actor opens the source and loads the models once. Source and folder must be on a disk that all
    machines can access. An actor that dies is restarted and makes its shards again. Shards are written
    atomically, so nothing is duplicated.

    Args:
        plan: the set to make.
        folder: the set's folder.
        step: the method of `Worker`.
        shards: the numbers of the shards.
        progress: called with the number of samples processed since its last call.
        workers: number of actors.
        address: address of a running cluster, such as "auto"; None uses the cluster that this process is
            connected to, or starts one on this machine.
        gpus_each: GPUs per actor; 0 for none, a fraction to share one.

    Raises:
        InvalidArgument: if Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing_package("ray", error) from error
    numbers = [{"shard": shard, "samples": len(plan.indices(shard))} for shard in shards]
    if not numbers:
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns about a future default
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
    """Restore the SIGTERM handler, which `ray.init` replaces by one that exits with status 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # in others Ray does not touch it
            signal.signal(signal.SIGTERM, before)


class _Actor:
    """A worker that lives as long as its process."""

    def __init__(self, plan: Plan, folder: SetFolder, step: str) -> None:
        import cv2

        cv2.setNumThreads(1)
        self._do = getattr(Worker(plan, folder), step)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            self._do(int(shard))
        return batch
