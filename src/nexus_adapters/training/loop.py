"""One visible training loop: any module, any loss, resumable at every checkpoint.

All randomness of a step must follow from (seed, step), which `step_generator` gives; then a run that was
stopped and continued takes the very steps of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nexus_adapters.training.optimizer import OptimizerName, build_optimizer

Loss = Callable[[int], Tensor]  # step -> scalar


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train. `learning_rate` is the peak; `schedule` what follows the warm-up."""

    max_train_steps: int
    learning_rate: float
    optimizer: OptimizerName = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    checkpoint_every_steps: int = 200
    log_every_steps: int = 20

    def that_decide_the_weights(self) -> dict[str, object]:
        """All but how often to log and to save; under a constant rate also but for how long."""
        free = {"checkpoint_every_steps", "log_every_steps"}
        free |= {"max_train_steps"} if self.schedule == "constant" else set()
        return {name: value for name, value in asdict(self).items() if name not in free}

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the optimizer step that follows `step` finished ones."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.learning_rate * warmup
        rest = max(1, self.max_train_steps - self.warmup_steps)
        progress = min(1.0, max(0, step - self.warmup_steps) / rest)
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step, independent of every other step's and seed's."""
    mixed = np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def train(
    module: nn.Module,
    loss_of_step: Loss,
    options: LoopOptions,
    output_dir: Path,
    name: str,
    identity: Mapping[str, object],
) -> None:
    """Minimise `loss_of_step` over the trainable parameters of `module`, in place.

    Writes `output_dir/checkpoint.pt` (atomically) and `output_dir/log.jsonl`; called again with the same
    `output_dir` it continues from the last checkpoint, and does nothing after the last step. Ctrl-C saves
    first, except in the midst of an update: half an update is in no step, so the last checkpoint stays.

    `identity`, of JSON's types, says on what is trained and from which seed. A checkpoint keeps it with the
    options that decide the weights; ValueError where a run would go on with others.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(
        options.optimizer, module, options.learning_rate, options.betas, options.weight_decay
    )
    run = {"options": _as_json(options.that_decide_the_weights()), "identity": _as_json(dict(identity))}
    step = _resume(output_dir, module, optimizer, run)
    updating = False
    progress = tqdm(total=options.max_train_steps, initial=step, desc=name, unit="step", mininterval=5)
    try:
        while step < options.max_train_steps:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate_at(step)
            loss = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward without types
            grad_norm = nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
            updating = True
            optimizer.step()
            step += 1
            updating = False
            progress.update()
            if step % options.log_every_steps == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                _log(output_dir, step, loss, grad_norm, options.learning_rate_at(step - 1), started)
            if step % options.checkpoint_every_steps == 0 or step == options.max_train_steps:
                _save(output_dir, module, optimizer, step, run)
    except KeyboardInterrupt:
        if not updating:
            _save(output_dir, module, optimizer, step, run)
        raise
    finally:
        progress.close()


def _log(
    output_dir: Path, step: int, loss: Tensor, norm: Tensor, learning_rate: float, started: float
) -> None:
    row = {
        "step": step,
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "learning_rate": learning_rate,
        "step_s": round(time.perf_counter() - started, 4),
    }
    with (output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


def _as_json(content: dict[str, object]) -> str:
    return json.dumps(content, sort_keys=True)


def _save(
    output_dir: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, run: dict[str, str]
) -> None:
    partial = output_dir / "checkpoint.pt.partial"
    state = {"step": step, "module": module.state_dict(), "optimizer": optimizer.state_dict(), "run": run}
    torch.save(state, partial)
    os.replace(partial, output_dir / "checkpoint.pt")


def _resume(
    output_dir: Path, module: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, str]
) -> int:
    path = output_dir / "checkpoint.pt"
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        _check_same_run(path, state["run"], run)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    _forget_rows_after(step, output_dir / "log.jsonl")
    return step


def _check_same_run(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for part, text in wanted.items():
        before, now = json.loads(saved[part]), json.loads(text)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{part}: expected {key} {before.get(key)}, as in the run that '{path}' is of; received "
                    f"{now.get(key)}. Go on as before, or train into another folder"
                )


def _forget_rows_after(step: int, log: Path) -> None:
    """Drop the rows of steps that a killed run took after its last checkpoint: they are taken again."""
    if not log.exists():
        return
    complete = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = "".join(line for line in complete if json.loads(line)["step"] <= step)
    partial = log.with_name("log.jsonl.partial")
    partial.write_text(kept)
    os.replace(partial, log)
