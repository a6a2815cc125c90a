import math

import pytest

from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.schedule import learning_rate_at


def rate(step, **changes):
    given = {"learning_rate": 0.05, "max_train_steps": 110, "warmup_steps": 10}
    return learning_rate_at(TrainingOptions(**given | changes), step)


def test_constant_after_the_warm_up():
    rates = [rate(step, schedule="constant", warmup_steps=3) for step in range(6)]
    assert rates == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 * 3 / 4, 0.05, 0.05, 0.05])


def test_cosine():
    assert [rate(step, schedule="cosine") for step in (0, 4, 10)] == pytest.approx(
        [0.05 / 11, 0.05 * 5 / 11, 0.05]
    )
    assert rate(60, schedule="cosine") == pytest.approx(0.025)
    assert rate(85, schedule="cosine") == pytest.approx(0.025 * (1 - math.sqrt(0.5)))
    assert 0 < rate(109, schedule="cosine") < 0.001 * 0.05
    assert rate(110, schedule="cosine") == rate(500, schedule="cosine") == 0


def test_linear():
    assert [rate(step, schedule="linear") for step in (10, 35, 60, 85, 110, 500)] == pytest.approx(
        [0.05, 0.0375, 0.025, 0.0125, 0, 0]
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_warm_up_starts_at_the_peak(schedule):
    assert rate(0, schedule=schedule, warmup_steps=0) == 0.05
