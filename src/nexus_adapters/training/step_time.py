"""How long a training takes on this machine: by its own log, or by a step with random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn

from nexus_adapters.bases.base import Base
from nexus_adapters.files import read_json_lines
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, find_method
from nexus_adapters.progress import progress
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.run_folder import LOG
from nexus_adapters.training.step_size import estimate_size, example_batch, training_device

_GIB = 2**30
_ROUNDS = 3
_ENOUGH_S = 30.0  # no further round after this long
_RECENT_ROWS = 50  # of a log
_HOUR, _DAY = 3600, 86_400


@dataclass(frozen=True)
class StepTime:
    """What an optimizer step took.

    Attributes:
        seconds: of a whole step, with all its accumulated batches.
        peak_bytes: the most memory that was allocated on a GPU; None on a CPU.
    """

    seconds: float
    peak_bytes: int | None


def describe_time(config: TrainConfig, base: Base, options: AdapterOptions, measure: bool) -> str:
    """Return a line on how long the run takes, and on a GPU one on the memory that was measured.

    More processes do not change the time of a step, apart from their communication: each has batches of
    `training.batch_size` of its own.

    Args:
        config: the recipe. A run in its output folder that has a log is not measured again.
        base: the base model; its weights are not needed.
        options: the adapter's options.
        measure: whether to time a step with random weights where there is no log.
    """
    done, logged = _logged(Path(config.output_dir))
    steps = config.training.max_train_steps
    if logged is not None:
        left = max(0, steps - done)
        what = f"about {duration(left * logged)} for the remaining {left:,} steps"
        return _line(what, logged, "median in this run's log")
    if not measure:
        return f"{'time':<13}not measured; --measure times a step on this machine"
    device = training_device(config.training)
    on_gpu = device.type == "cuda"
    needed, free = _needed_and_free(
        config, base, options, device, config.training.batch_size if on_gpu else 1
    )
    name = torch.cuda.get_device_name(device) if on_gpu else "this CPU"
    if needed > free:
        sizes = f"a step needs about {needed / _GIB:.1f} GiB, and {free / _GIB:.1f} GiB are free"
        return f"{'time':<13}not measured: {sizes}"
    try:
        found = _measure_random(config, base, options, device)
    except torch.OutOfMemoryError:
        return f"{'time':<13}not measured: a step does not fit in the memory of {name}"
    line = _line(
        f"about {duration(steps * found.seconds)} on {name}",
        found.seconds,
        "measured with random weights in one process; encoding, validation and checkpoints come on top",
    )
    if found.peak_bytes is None:
        return line
    return f"{'measured':<13}{found.peak_bytes / _GIB:.2f} GiB at the peak of a step\n{line}"


def measure_step(
    config: TrainConfig, base: Base, denoiser: Any, adapter: Any, options: AdapterOptions, count: int
) -> StepTime:
    """Time a training step of `adapter`, whose weights change, on a batch of random values.

    Args:
        config: its sections `training`, `loss` and `data.resolution` are read.
        base: with its noise schedule.
        denoiser: frozen, in the precision and on the device of training.
        adapter: trainable, on the same device.
        options: of the adapter.
        count: samples in the batch that is timed. The time of a step is scaled to the recipe's batch.
    """
    training, device = config.training, next(denoiser.parameters()).device
    precision = choose_precision(training.mixed_precision, device)
    method = find_method(options.method)
    network: Any = method.network(adapter, denoiser)
    if training.gradient_checkpointing:  # as in training
        denoiser.enable_gradient_checkpointing()
        if getattr(network, "_supports_gradient_checkpointing", False):
            network.enable_gradient_checkpointing()
    called = network if method.is_fused else denoiser
    places = FeaturePlaces(denoiser, base.places())
    objective = Objective(base, called, places, method, network, precision, config.loss)
    optimizer = build_optimizer(training, adapter)
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    with torch.device(device):
        batch = example_batch(base, count, config.data.resolution, torch.float32)
        for tensor in (batch.latents, batch.noise, batch.prompt_embeds, *batch.added.values()):
            tensor.normal_()
        batch.condition.uniform_()
        batch.u.uniform_()

    def gradients() -> None:
        objective.of(batch).backward()  # type: ignore[no-untyped-call]  # torch gives it no types

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    part_s, update_s = _timed((gradients, update), device)
    batches = training.gradient_accumulation_steps * training.batch_size / count
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepTime(batches * part_s + update_s, peak)


def _timed(calls: tuple[Callable[[], None], ...], device: torch.device) -> list[float]:
    """Median seconds of each call, in turns. The first round also allocates and chooses kernels."""
    rounds: list[list[float]] = []
    started = time.perf_counter()
    with progress(what="measuring a training step", unit="round", total=1 + _ROUNDS, mininterval=2) as bar:
        while len(rounds) <= _ROUNDS and time.perf_counter() - started < _ENOUGH_S:
            rounds.append([_seconds(call, device) for call in calls])
            bar.update()
    kept = rounds[1:] or rounds
    return [median(column) for column in zip(*kept, strict=True)]


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _needed_and_free(
    config: TrainConfig, base: Base, options: AdapterOptions, device: torch.device, count: int
) -> tuple[int, int]:
    """Bytes that a step on `count` samples needs, by its shapes, and that the device has left."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    return estimate_size(config, base, options, count).total_bytes, int(free)


def _measure_random(
    config: TrainConfig, base: Base, options: AdapterOptions, device: torch.device
) -> StepTime:
    """`measure_step` with a denoiser and an adapter of random weights."""
    training = config.training
    dtype = choose_precision(training.mixed_precision, device).dtype
    denoiser: Any = nn.Module.to(base.empty_denoiser(), dtype)
    denoiser = nn.Module.to_empty(denoiser, device=device).requires_grad_(False).eval()
    for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
        # Unset memory may hold tiny values, which slow a CPU down, and infinities.
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02) if tensor.ndim > 1 else nn.init.constant_(tensor, 0.5)
    with torch.device(device):
        adapter: Any = find_method(options.method).build(base, denoiser, options)
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    to: Any = nn.Module.to
    to(denoiser, memory_format=layout)
    to(adapter, device, memory_format=layout).train()
    try:
        if device.type == "cuda":
            return measure_step(config, base, denoiser, adapter, options, training.batch_size)
        found = measure_step(config, base, denoiser, adapter, options, 1)
        if found.seconds > _ENOUGH_S:
            return found
        needed, free = _needed_and_free(config, base, options, device, training.batch_size)
        if needed > free:
            return found
        # A small base takes less for a batch than for its samples one by one.
        return measure_step(config, base, denoiser, adapter, options, training.batch_size)
    finally:
        del denoiser, adapter
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _logged(folder: Path) -> tuple[int, float | None]:
    """(the last step in the log of the run in a folder, median seconds of its recent steps)."""
    if not (folder / LOG).is_file():
        return 0, None
    rows = [row for row in read_json_lines(folder / LOG, dict) if "step_s" in row]
    recent = [float(row["step_s"]) for row in rows[-_RECENT_ROWS:]]
    return (int(rows[-1]["step"]), median(recent)) if recent else (0, None)


def _line(what: str, seconds: float, how: str) -> str:
    digits = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return f"{'time':<13}{what} ({digits} s per step, {how})"


def duration(seconds: float) -> str:
    """Seconds as text, such as "3.1 hours"."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * _HOUR:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 3 * _DAY:
        return f"{seconds / _HOUR:.1f} hours"
    return f"{seconds / _DAY:.1f} days"
