import re

import pytest
import torch
from diffusers import DDIMScheduler
from tests.weights import use_weights

from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.generation.models import build_scheduler, load_model
from nexus_adapters.generation.requests import SCHEDULERS


def refusal(base, name, steps):
    try:
        build_scheduler(base, name, steps)
    except InvalidArgument as error:
        return error
    return None


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_takes_the_steps_or_says_how_many_it_takes(name):
    base = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    for given in (1, 2, 3, 4, 5, 51, 1000):
        steps = given
        if problem := refusal(base, name, steps):
            bound, nearest = re.search(r"at (least|most) (\d+)$", problem.expected).groups()
            assert problem.name == "steps"
            assert int(nearest) > steps if bound == "least" else int(nearest) < steps
            steps = int(nearest)
        scheduler = build_scheduler(base, name, steps)
        if name == "lms" and steps == 1000:
            continue  # takes seconds
        scheduler.set_timesteps(steps)
        latents = torch.ones(1, 1, 1, 1) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noise = 0.1 * scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(noise, timestep, latents).prev_sample
        assert torch.isfinite(latents).all()


def test_an_adapter_is_loaded_once_and_the_base_is_shared(tiny_weights, monkeypatch):
    use_weights(monkeypatch, tiny_weights)
    prime, slim = find_saved("prime"), find_saved("slim")
    model = load_model(BaseSource(), [prime], torch.float32)
    other = model.with_adapters([slim, find_saved("prime"), slim])
    assert other.pipe is model.pipe
    assert other.adapters[1] is model.adapters[0]
    assert other.adapters[0] is other.adapters[2]
    assert [each.name for each in other.adapters] == ["embedded slim", "embedded prime", "embedded slim"]
    assert other.adapters[0].sha256 == slim.sha256()
