"""Validation during a run: the loss by timestep with fixed noise, and images with their structure score.

The loss of a single training step says little, because it depends mostly on the sampled timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexus_adapters.data.batch import Batch
from nexus_adapters.training.distributed import log_images
from nexus_adapters.training.validation_images import ValidationInput, save_sheet

BINS = 10  # equal parts of the noise schedule


@dataclass
class Validation:
    """An `Observer` that validates every `every_steps` steps.

    Attributes:
        batches: this process's held-out samples; their noise is the same in every validation.
        losses: (batch, timesteps) -> each sample's loss with the current weights.
        num_train_timesteps: length of the noise schedule.
        inputs: what images are generated from.
        generate: inputs -> images; called only on the main process.
        score: (condition, image) -> score in [0, 1], higher is better; None without a score.
        folder: where the sheets of images are written.
        accelerator: the processes that train together.
        every_steps: optimizer steps between validations.
        patience: number of validations without a better score after which the run ends; 0 for never.
        last_step: the run's last step, which is always validated.
        selects_best: whether the weights with the best score are exported.
        is_healthy: returns whether the current weights would be saved if they were the best.

    The score is that of `score` or, without it, the negative mean loss.
    """

    batches: Sequence[Batch]
    losses: Callable[[Batch, Tensor], Float[Tensor, " b"]]
    num_train_timesteps: int
    inputs: Sequence[ValidationInput]
    generate: Callable[[Sequence[ValidationInput]], list[Image.Image]]
    score: Callable[[Image.Image, Image.Image], float] | None
    folder: Path
    accelerator: Accelerator
    every_steps: int
    patience: int
    last_step: int = 0
    selects_best: bool = False
    is_healthy: Callable[[], bool] = lambda: True
    best_score: float | None = None
    worse_in_a_row: int = 0
    best_step: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether the score has not improved for `patience` validations."""
        return 0 < self.patience <= self.worse_in_a_row

    def after_step(self, step: int) -> dict[str, Any]:
        """Return the losses by timestep and the structure score if a validation is due, else {}."""
        if step % self.every_steps and step != self.last_step:
            return {}
        found: dict[str, Any] = self.loss_by_timestep()
        score = self._generate_and_score(step) if self.inputs else None
        if score is not None:
            found["structure_score"] = round(score, 4)
        if score is None or not math.isfinite(found["val_loss"]):
            score = -found["val_loss"]
        self._compare(score, step)
        return found

    def _compare(self, score: float, step: int) -> None:
        is_better = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        self.worse_in_a_row = 0 if is_better else self.worse_in_a_row + 1
        if is_better and self.is_healthy():
            self.best_score = score
            self.best_step = step if self.selects_best else None

    @torch.no_grad()
    def loss_by_timestep(self) -> dict[str, float]:
        """Return the mean loss in the middle of each tenth of the schedule, and the mean of these."""
        sums = torch.zeros(BINS + 1, dtype=torch.float64, device=self.accelerator.device)
        for batch in self.batches:
            for place in range(BINS):
                timestep = int((place + 0.5) * self.num_train_timesteps / BINS)
                timesteps = torch.full((len(batch.indices),), timestep, device=self.accelerator.device)
                sums[place] += self.losses(batch, timesteps).double().sum()
            sums[BINS] += len(batch.indices)
        total: Any = self.accelerator.reduce(sums, "sum")
        means = (total[:BINS] / total[BINS]).tolist()
        width = self.num_train_timesteps // BINS
        named = {f"val_loss_{place * width:04d}": round(mean, 6) for place, mean in enumerate(means)}
        return {"val_loss": round(sum(means) / BINS, 6), **named}

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {
            "best_score": self.best_score,
            "worse_in_a_row": self.worse_in_a_row,
            "best_step": self.best_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint."""
        self.best_score, self.worse_in_a_row = state["best_score"], state["worse_in_a_row"]
        self.best_step = state.get("best_step") if self.selects_best else None
        if self.selects_best and self.best_step is None:
            self.best_score = None  # its weights were not kept, so select the best from here on

    def _generate_and_score(self, step: int) -> float | None:
        """Generate and score images on the main process; return the score on all processes."""
        score = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.is_main_process:
            images = self.generate(self.inputs)
            sheet = save_sheet(self.folder / f"step-{step:08d}.png", self.inputs, images)
            log_images(self.accelerator, sheet, step)
            if self.score is not None:
                pairs = zip(self.inputs, images, strict=True)
                score += float(np.mean([self.score(given.condition, image) for given, image in pairs]))
        summed: Any = self.accelerator.reduce(score, "sum")
        return None if self.score is None else float(summed)
