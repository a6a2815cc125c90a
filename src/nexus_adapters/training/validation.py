"""What a run shows of itself: loss by timestep on fixed noise, and pictures with their structure score.

The loss of single steps says little: it is dominated by which timesteps were drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nexus_adapters.data.batch import Batch
from nexus_adapters.files import replacing
from nexus_adapters.training.distributed import show_to_trackers

BINS = 10
_FONT_SIZE = 10  # of the prompts on a sheet, pixels
_TEXT_HEIGHT = 70

# A batch and its timesteps -> each sample's loss.
SampleLosses = Callable[[Batch, Tensor], Float[Tensor, " b"]]


@dataclass(frozen=True)
class Picture:
    """What a picture is drawn from."""

    prompt: str
    condition: Image.Image


@dataclass
class Validation:
    """An `Observer` that validates every so many steps.

    Attributes:
        batches: this process's held-out samples, with the noise that is theirs in every validation.
        losses: under the weights as they are at the time.
        num_train_timesteps: of the noise schedule.
        draw: pictures, drawn; called on the main process alone.
        score: (condition, picture) -> in [0, 1], higher is better; None where nothing scores.
        pictures: what to draw.
        folder: where the sheets go.
        accelerator: the processes that train together.
        every_steps: between validations.
        patience: validations without a better score until the run ends; 0 never ends it.
        last_step: of the run, after which it validates in any case.
    """

    batches: Sequence[Batch]
    losses: SampleLosses
    num_train_timesteps: int
    draw: Callable[[Sequence[Picture]], list[Image.Image]]
    score: Callable[[Image.Image, Image.Image], float] | None
    pictures: Sequence[Picture]
    folder: Path
    accelerator: Accelerator
    every_steps: int
    patience: int
    last_step: int = 0
    best_score: float | None = None
    worse_in_a_row: int = 0

    @property
    def is_over(self) -> bool:
        """Whether the score has not risen for as many validations as `patience` allows."""
        return 0 < self.patience <= self.worse_in_a_row

    def after_step(self, step: int) -> dict[str, Any]:
        """The losses by timestep and the structure score, where it is time for them."""
        if step % self.every_steps and step != self.last_step:
            return {}
        found: dict[str, Any] = self.loss_by_timestep()
        score = self._draw_and_score(step) if self.pictures else None
        if score is not None:
            found["structure_score"] = round(score, 4)
            is_better = self.best_score is None or score > self.best_score
            self.best_score = score if is_better else self.best_score
            self.worse_in_a_row = 0 if is_better else self.worse_in_a_row + 1
        return found

    @torch.no_grad()
    def loss_by_timestep(self) -> dict[str, float]:
        """The mean loss in the middle of each tenth of the schedule, and over all of them."""
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
        """For a checkpoint."""
        return {"best_score": self.best_score, "worse_in_a_row": self.worse_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.best_score, self.worse_in_a_row = state["best_score"], state["worse_in_a_row"]

    def _draw_and_score(self, step: int) -> float | None:
        """Draw on the main process, and tell the score to all."""
        score = torch.zeros((), device=self.accelerator.device)
        if self.accelerator.is_main_process:
            drawn = self.draw(self.pictures)
            sheet = save_sheet(self.folder / f"step-{step:08d}.png", self.pictures, drawn)
            show_to_trackers(self.accelerator, sheet, step)
            if self.score is not None:
                pairs = zip(self.pictures, drawn, strict=True)
                score += float(np.mean([self.score(p.condition, image) for p, image in pairs]))
        summed: Any = self.accelerator.reduce(score, "sum")
        return None if self.score is None else float(summed)


def save_sheet(path: Path, pictures: Sequence[Picture], drawn: Sequence[Image.Image]) -> Image.Image:
    """Conditions, what was drawn from them, and the prompts, side by side; written whole or not at all."""
    width, height = (max(sides) for sides in zip(*(image.size for image in drawn), strict=True))
    sheet = Image.new("RGB", (width * len(drawn), 2 * height + _TEXT_HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT_SIZE)
    for column, (picture, image) in enumerate(zip(pictures, drawn, strict=True)):
        left = column * width
        sheet.paste(picture.condition.resize(image.size, Image.Resampling.BOX), (left, 0))
        sheet.paste(image, (left, height))
        lines = textwrap.wrap(picture.prompt, max(8, 2 * width // _FONT_SIZE))  # a letter is half as wide
        text = "\n".join(lines[: _TEXT_HEIGHT // (_FONT_SIZE + 3)])
        pen.multiline_text((left + 2, 2 * height + 2), text, "black", font, spacing=2)
    with replacing(path) as stream:
        sheet.save(stream, format="PNG")
    return sheet
