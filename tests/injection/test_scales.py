import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases.unet import noise_factors
from nexus_adapters.injection import Control
from nexus_adapters.injection.scales import (
    BALANCES,
    LEVEL_SCALES,
    balance,
    check_level_scales,
    check_scale,
    scale_at,
    schedule_position,
)


@pytest.mark.parametrize("timesteps", [1000, 30])
def test_a_boundary_is_the_number_that_a_user_writes(timesteps):
    """`start <= p <= end` must hold at p = start and p = end."""
    for tenth in range(11):
        written = float(f"0.{tenth}") if tenth < 10 else 1.0
        assert schedule_position(timesteps - timesteps * tenth // 10, timesteps) == written
        as_tensor = torch.tensor([timesteps - timesteps * tenth // 10] * 2)
        assert schedule_position(as_tensor, timesteps) == written


def test_noise_factors_are_the_noises_share_to_a_power():
    scheduler = DDIMScheduler()
    timesteps = torch.tensor([[0, 1], [500, 999]])
    share = 1 - scheduler.alphas_cumprod[timesteps]  # of the variance; the rest is the image's
    assert torch.equal(noise_factors(scheduler, timesteps, 1), share)
    assert torch.allclose(noise_factors(scheduler, timesteps, 0.5), share.sqrt())
    assert torch.equal(noise_factors(scheduler, timesteps, 0), torch.ones(2, 2))
    assert share[0, 0] < 0.001
    assert share[1, 1] > 0.99


def test_noise_factors_between_timesteps():
    """Some samplers take fractions; what an Euler sampler calls t is the training's t."""
    scheduler = EulerDiscreteScheduler()
    low, high = (1 - scheduler.alphas_cumprod[[10, 11]]).tolist()
    assert float(noise_factors(scheduler, 10.25, 1)) == pytest.approx(0.75 * low + 0.25 * high)
    assert float(noise_factors(scheduler, 1000, 1)) == float(noise_factors(scheduler, 999, 1))


def test_noise_factors_need_a_schedule_of_noise():
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for scheduler in (FlowMatchEulerDiscreteScheduler(), flow, None):
        with refused("noise_exponent", f"a {type(scheduler).__name__}", expected="alphas_cumprod"):
            noise_factors(scheduler, 5, 1)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (1, 1.0),
        (-0.5, -0.5),
        ([1, 0.5], (1.0, 0.5)),
        ((2,), (2.0,)),
        (np.linspace(0, 1, 3), (0.0, 0.5, 1.0)),
        (torch.tensor([1.0, 0.0]), (1.0, 0.0)),
        (torch.tensor(0.5), 0.5),
        (np.array(2), 2.0),
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
