"""The training loop: any module and any loss, on one device or several, resumable at every step.

All randomness in a step must be derived from (seed, step), as `step_generator` does. Then a resumed run takes
exactly the same steps as an uninterrupted one.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nexus_adapters.progress import progress
from nexus_adapters.training.checkpoint import NotFinite, TrainState
from nexus_adapters.training.config import CheckpointOptions, LogOptions, TrainingOptions
from nexus_adapters.training.optimizer import learning_rate_at
from nexus_adapters.training.run_folder import Observer, RunFolder

# Number of finished steps -> the losses of the next step's batches, each used before the next is computed.
Losses = Callable[[int], Iterable[Tensor]]


class Stopped(Exception):  # noqa: N818  # not an error: the user requested it
    """The run was interrupted by a signal and saved a checkpoint. `exit_status` is a shell's: 130 or 143.

    `saved_step` is the step that the run resumes from if it is not `step`, because a step without a finite
    gradient is not saved.
    """

    def __init__(self, signal_number: int, step: int, saved_step: int | None = None) -> None:
        self.exit_status = 128 + signal_number
        self.step = step
        saved = "which is saved"
        if saved_step not in (None, step):
            last = f"the last saved step is {saved_step}" if saved_step else "no step has been saved"
            saved = f"which is not saved because its gradient is not finite; {last}"
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}, {saved}")


class DivergedError(FloatingPointError):
    """The gradient was not finite in too many steps in a row, or the weights are not finite."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a CPU generator for one step, independent of those of all other steps and seeds."""
    mixed = np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def train(
    state: TrainState,
    losses: Losses,
    training: TrainingOptions,
    checkpoints: CheckpointOptions,
    log: LogOptions,
    output_dir: Path,
    name: str,
    identity: Mapping[str, object],
    accelerator: Accelerator,
    wrapped: nn.Module | None = None,
    observer: Observer | None = None,
) -> int:
    """Minimize the mean of `losses` over the trainable parameters of `state.module`, in place.

    Writes `output_dir/checkpoints/` and `output_dir/log.jsonl`. Called again with the same `output_dir`, it
    resumes from the newest undamaged checkpoint, and does nothing after the last step.

    Args:
        state: before the first step; the newest checkpoint is loaded into it.
        losses: returns as many losses as `gradient_accumulation_steps`, of this process's samples.
        training: steps, schedule, clipping and accumulation.
        checkpoints: when to save.
        log: when to log.
        output_dir: the run's folder.
        name: shown in the progress bar.
        identity: all that determines the weights, as JSON types. It is stored in every checkpoint and must be
            the same when the run resumes.
        accelerator: the processes that train together.
        wrapped: the module as the losses call it, if it is wrapped for several processes.
        observer: called after every step; it can end the run.

    No checkpoint is written while gradients are not finite. Older checkpoints are removed only once the
    newest one has been followed by a step with a finite gradient, so the last healthy checkpoint is always
    kept.

    Returns:
        The number of finished steps. The last one is saved if its gradient was finite.

    Raises:
        Stopped: after Ctrl-C or SIGTERM, with the last step saved if its gradient was finite.
        DivergedError: after `max_bad_steps` steps in a row without a finite gradient, or if the weights to be
            saved are not finite.
        InvalidArgument: if the run in `output_dir` has a different identity or has lost its checkpoints.
    """
    run = RunFolder(output_dir, state, identity, accelerator, checkpoints, observer)
    step = run.resume()
    is_due = False
    is_over = observer is not None and observer.is_over
    bar = progress(
        what=f"training {name}",
        unit="step",
        total=training.max_train_steps,
        initial=step,
        mininterval=2,
        shown=accelerator.is_main_process,
    )
    with stop_requests() as request, bar:
        while step < training.max_train_steps and not is_over:
            started = time.perf_counter()
            rate = learning_rate_at(training, step)
            loss, norm = _gradients(state, losses(step), training, accelerator, wrapped)
            is_finite = bool(torch.isfinite(norm))
            _update(state, rate, is_finite)
            step += 1
            state.bad_steps = 0 if is_finite else state.bad_steps + 1
            if step % log.every_steps == 0 or not is_finite:
                row = _row(step, loss, norm, rate, is_finite, started, training, accelerator)
                run.log(row)
                shown = {name: row[name] for name in ("loss", "samples_per_s", "memory_gib")}
                bar.set_postfix(shown, refresh=False)
            bar.update()
            if state.bad_steps >= training.max_bad_steps:
                what = f"no finite gradient in {state.bad_steps} steps in a row"
                raise DivergedError(_diagnosis(what, step, rate, training, run.last_healthy()))
            if is_finite:
                run.remove_old()  # the newest checkpoint's weights have just given a finite gradient
            if observer is not None:
                if found := observer.after_step(step):
                    run.log({"step": step, **found})
                is_over = observer.is_over
            signal_number = _agreed(request, accelerator)
            is_last = is_over or step == training.max_train_steps
            is_best = observer is not None and observer.best_step == step
            is_due = is_due or is_last or is_best or checkpoints.is_due(step)
            if state.bad_steps == 0 and (is_due or signal_number):
                try:
                    run.save(step)
                except NotFinite as error:
                    message = _diagnosis(str(error), step, rate, training, run.last_healthy())
                    raise DivergedError(message) from error
                is_due = False
            if signal_number and not is_last:
                raise Stopped(signal_number, step, run.saved_step)
    if is_over and step < training.max_train_steps and accelerator.is_main_process:
        why = "the score has not improved for validation.early_stop_patience validations"
        print(f"training: stopped after {step} of {training.max_train_steps} steps: {why}", file=sys.stderr)
    if state.bad_steps == 0:
        run.remove_old()
    return step


@dataclass
class StopRequest:
    """`signal_number` is that of the first signal received; 0 if there was none."""

    signal_number: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, SIGINT and SIGTERM are only recorded, except that a second SIGINT interrupts immediately.

    A second SIGTERM does not, since schedulers and launchers send it more than once.

    Signals are not recorded outside the main thread, where they cannot be handled.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_number == number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = request.signal_number or number

    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gradients(
    state: TrainState,
    losses: Iterable[Tensor],
    training: TrainingOptions,
    accelerator: Accelerator,
    wrapped: nn.Module | None,
) -> tuple[Tensor, Tensor]:
    """Compute the clipped gradients of a step. Returns its loss and the gradient norm before clipping."""
    parts = training.gradient_accumulation_steps
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    remaining = iter(losses)
    for part in range(parts):
        # The processes exchange gradients only in the last part; DDP must know this in the forward pass.
        is_alone = wrapped is None or part == parts - 1
        with nullcontext() if is_alone else accelerator.no_sync(wrapped):
            loss = next(remaining) / parts
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)
    trained = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    return total, nn.utils.clip_grad_norm_(trained, training.max_grad_norm)


def _update(state: TrainState, rate: float, is_finite: bool) -> None:
    """Take an optimizer step, unless the gradients are not finite."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    if is_finite:
        state.scaler.step(state.optimizer)
    state.scaler.update()
    if is_finite and state.average is not None:
        state.average.update_parameters(state.module)


def _row(
    step: int,
    loss: Tensor,
    norm: Tensor,
    rate: float,
    is_finite: bool,
    started: float,
    training: TrainingOptions,
    accelerator: Accelerator,
) -> dict[str, Any]:
    mean: Any = accelerator.reduce(loss, "mean")  # over the processes, each of which has its own samples
    spent_s = time.perf_counter() - started
    samples = training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    row = {
        "step": step,
        "loss": round(float(mean), 6),
        "grad_norm": float(norm),
        "learning_rate": rate,
        "step_s": round(spent_s, 4),
        "samples_per_s": round(samples / spent_s, 2),
        "memory_gib": _memory_gib(accelerator.device),
    }
    return row if is_finite else row | {"skipped": True}


def _memory_gib(device: torch.device) -> float:
    """Memory of this process in GiB: the peak on a GPU, the current use on a CPU.

    Pages of memory-mapped files are not counted where the system reports them, since it can drop them.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    info = psutil.Process().memory_info()
    held: int = info.rss - getattr(info, "shared", 0)
    return round(held / 2**30, 2)


def _agreed(request: StopRequest, accelerator: Accelerator) -> int:
    """The signal that any process received; 0 for none. All processes must stop after the same step."""
    if accelerator.num_processes == 1:
        return request.signal_number
    numbers: Any = accelerator.gather(torch.tensor([request.signal_number], device=accelerator.device))
    return int(numbers.max())


def _diagnosis(what: str, step: int, rate: float, training: TrainingOptions, healthy: Path | None) -> str:
    """The error text: what happened and what to do. `healthy` is the checkpoint to start again from."""
    text = (
        f"training: {what}, up to step {step}, at learning rate {rate:g} and mixed_precision "
        f"{training.mixed_precision}. Train in a new output_dir with a lower training.learning_rate, a "
        "longer warm-up, or mixed_precision bf16 or no"
    )
    if healthy is not None:
        return f'{text}; set adapter.start_from = "{healthy}" to start from the last healthy checkpoint'
    return f"{text}. If the first steps fail, check the base and the data for invalid values"
