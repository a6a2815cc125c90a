import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tests.refusals import refused

from nexus_adapters.bases.unet import noise_factors
from nexus_adapters.injection.schedule import schedule_position


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
