import numpy as np
import pytest
import torch
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control
from nexus_adapters.injection.strength import (
    BALANCES,
    LEVEL_SCALES,
    balance,
    check_level_scales,
    check_scale,
    scale_at,
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        ([1, 0.5], (1.0, 0.5)),
        ((2,), (2.0,)),
        (np.linspace(0, 1, 3), (0.0, 0.5, 1.0)),
        (torch.tensor([1.0, 0.0]), (1.0, 0.0)),
    ],
)
def test_scales(given, kept):
    assert check_scale(given) == kept


@pytest.mark.parametrize(
    ("wrong", "name", "received"),
    [
        (True, "scale", "True"),
        (None, "scale", "None"),
        ("1", "scale", "'1'"),
        (float("nan"), "scale", "nan"),
        ([], "scale", "[]"),
        (["a"], "scale[0]", "'a'"),
        ([1, float("inf")], "scale[1]", "inf"),
        (np.ones((2, 2)), "scale[0]", "[1.0, 1.0]"),
    ],
)
def test_what_is_no_scale(wrong, name, received):
    with refused(name, received):
        check_scale(wrong)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 10, 20, 50, 100])
def test_numbers_for_steps_that_divide_the_schedule(count):
    for timesteps in (
        np.arange(count) * (1000 // count) + 1,
        np.round(np.arange(1000, 0, -1000 / count)) - 1,
    ):
        positions = sorted((1000 - float(t)) / 1000 for t in timesteps)
        assert [scale_at(tuple(map(float, range(count))), p) for p in positions] == list(range(count))


def test_a_list_covers_the_whole_schedule():
    scale = (1.0, 0.5, 0.25)
    assert [scale_at(scale, p) for p in (-0.1, 0, 0.33, 0.34, 0.67, 1, 1.1)] == [
        1,
        1,
        1,
        0.5,
        0.25,
        0.25,
        0.25,
    ]


def test_a_function_must_give_a_number():
    assert scale_at(lambda position: position**2, 0.5) == 0.25
    with refused("scale(0.5)", "None", expected="a finite number"):
        scale_at(lambda position: None, 0.5)


def test_level_scales():
    assert check_level_scales(None, 4) is None
    assert check_level_scales([1, 0, 0.5, 2], 4) == (1.0, 0.0, 0.5, 2.0)
    assert check_level_scales("prompt", 4) == (0.25, 0.62, 0.825, 1.0) == LEVEL_SCALES["prompt"]
    assert check_level_scales("balanced", 3) == (1.0, 1.0, 1.0)
    assert check_level_scales("prompt", 3) == pytest.approx((0.25, 0.7225, 1.0))
    assert check_level_scales("prompt", 1) == (0.25,)


@pytest.mark.parametrize(
    ("wrong", "received", "hint"),
    [
        ([1, 1], "2", ""),
        (1.0, "1.0", ""),
        ("soft", "'soft'", ""),
        ("control", "'control'", "**balance('control')"),
    ],
)
def test_what_are_no_level_scales(wrong, received, hint):
    with refused("level_scales", received, expected="4 numbers", hint=hint) as caught:
        check_level_scales(wrong, 4)
    assert "balanced, prompt" in caught.value.expected
    with refused("level_scales[1]", "'a'", expected="a finite number"):
        check_level_scales([1, "a"], 2)


def test_balances_are_settings_of_a_control():
    adapter = tiny.adapter(tiny.unet())
    found = {name: Control(adapter, tiny.condition(), **balance(name)) for name in BALANCES}
    assert {name: (control.level_scales, control.policy) for name, control in found.items()} == {
        "balanced": ((1, 1, 1, 1), "positive"),
        "prompt": ((0.25, 0.62, 0.825, 1), "positive"),
        "control": ((1, 1, 1, 1), "cond_only"),
    }
    with refused("balance", "'both'", expected="balanced, prompt, control"):
        balance("both")
