from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tests.training.test_loss import batch

from nexus_adapters.conditions import extract
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.validation import BINS, Validation
from nexus_adapters.training.validation_images import ValidationInput, structure_score


def by_timestep(given, timesteps):
    return timesteps.float()


def validation(losses, score=None, patience=0, inputs=(), folder=Path(), every=2, **given):
    return Validation(
        batches=[batch(3), batch(2, seed=1)],
        losses=losses,
        num_train_timesteps=1000,
        inputs=inputs,
        generate=lambda wanted: [each.condition for each in wanted],
        score=score,
        folder=folder,
        accelerator=Accelerator(cpu=True, mixed_precision="no"),
        every_steps=every,
        patience=patience,
        **given,
    )


def test_losses_are_means_over_samples_in_the_middle_of_each_tenth():
    seen = []

    def losses(given, timesteps):
        seen.append((len(given.indices), timesteps.unique().tolist()))
        return timesteps.float() + torch.arange(len(timesteps))

    found = validation(losses).loss_by_timestep()
    assert seen == [(count, [50 + 100 * place]) for count in (3, 2) for place in range(BINS)]
    extra = (0 + 1 + 2 + 0 + 1) / 5
    assert found == {"val_loss": 500 + extra} | {
        f"val_loss_{100 * p:04d}": 50 + 100 * p + extra for p in range(10)
    }


def test_only_when_it_is_time():
    checked = validation(by_timestep)
    assert [bool(checked.after_step(step)) for step in range(1, 7)] == [False, True] * 3


def test_it_is_over_when_the_score_no_longer_rises(tmp_path):
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    checked = validation(
        by_timestep,
        lambda condition, image: next(scores),
        patience=2,
        inputs=[ValidationInput("a star", Image.new("RGB", (8, 8)))],
        folder=tmp_path,
        every=1,
    )
    ends = []
    for step in range(1, 5):
        assert "structure_score" in checked.after_step(step)
        ends.append(checked.is_over)
        again = validation(by_timestep, patience=2)
        again.restore(checked.state())
        assert again.is_over == checked.is_over
    assert ends == [False, False, False, True]
    assert Image.open(tmp_path / "step-00000003.png").size == (8, 16 + 70)


def looked_at(values, **given):
    """The best step after each validation, by losses or, of pairs, by scores."""
    losses, scores = (
        iter([v[0] if isinstance(v, tuple) else v for v in values for _ in range(2 * BINS)]),
        None,
    )
    if isinstance(values[0], tuple):
        left = iter([v[1] for v in values])
        scores = lambda condition, image: next(left)  # noqa: E731
    checked = validation(
        lambda batch, t: torch.full((len(batch.indices),), next(losses)),
        scores,
        inputs=[ValidationInput("a star", Image.new("RGB", (8, 8)))] if scores else (),
        every=1,
        **given,
    )
    found = []
    for step in range(1, len(values) + 1):
        checked.after_step(step)
        found.append(checked.best_step)
    return found, checked


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([3.0, 2.0, 2.5, 1.0], [1, 2, 2, 4]),  # without a score, by the loss
        ([float("nan"), 2.0, float("nan"), 2.0], [None, 2, 2, 2]),
        ([(1.0, 0.2), (2.0, 0.9), (0.5, 0.4)], [1, 2, 2]),
        ([(float("nan"), 0.2), (2.0, 0.1), (float("inf"), 0.4)], [None, 2, 2]),  # garbage may score well
    ],
)
def test_the_best_step_is_that_of_the_best_score(tmp_path, values, best):
    assert looked_at(values, folder=tmp_path, selects_best=True)[0] == best
    assert looked_at(values, folder=tmp_path)[0] == [None] * len(values)  # of a run that ends in its last


def test_weights_that_are_not_saved_are_not_the_best(tmp_path):
    health = iter([True, False, True])
    found, checked = looked_at([3.0, 1.0, 2.0], selects_best=True, is_healthy=lambda: next(health))
    assert found == [1, 1, 3]
    again = validation(by_timestep, selects_best=True)
    again.restore(checked.state())
    assert (again.best_step, again.best_score) == (3, -2.0)
    again.restore({"best_score": 5.0, "worse_in_a_row": 0})  # of a run that did not keep them
    assert (again.best_step, again.best_score) == (None, None)


def lines(*columns):
    image = Image.new("RGB", (32, 32))
    for column in columns:
        image.paste((255, 255, 255), (column, 0, column + 16, 32))
    return image


def test_the_structure_of_an_image_is_its_own_map():
    image = lines(8)
    score = structure_score(DataOptions(path="x"))
    assert score(extract("canny", image), image) == 1.0
    assert score(extract("canny", lines(0)), image) == 0.0
    assert 0 < score(extract("canny", lines(8, 28)), image) < 1
    assert structure_score(DataOptions(path="x", condition="no such thing")) is None
    # A model that nobody named is not downloaded, and no extractor reproduces the exact maps of scenes.
    assert structure_score(DataOptions(path="x", condition="depth")) is None
    assert structure_score(DataOptions(path="x", condition="depth", extractor={"model": "m"})) is not None
    assert structure_score(DataOptions(kind="scenes", count=1, condition="sketch")) is None
    assert structure_score(DataOptions(kind="scenes", count=1)) is not None


@pytest.mark.parametrize("high", [20.0, 1530.0])
def test_the_extractors_options_count(high):
    soft = Image.new("RGB", (32, 32), (100, 100, 100))
    soft.paste((140, 140, 140), (8, 0, 24, 32))
    options = {"low": 10.0, "high": high}
    score = structure_score(DataOptions(path="x", extractor=options))
    assert score(extract("canny", soft, **options), soft) == 1.0
