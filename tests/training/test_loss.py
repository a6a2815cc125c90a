import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tests import tiny
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.training.loss import denoising_losses, draw_timesteps

COUNT = 40_000


def drawn(sampling, seed=0, count=COUNT, steps=1000):
    return draw_timesteps(sampling, count, steps, torch.Generator().manual_seed(seed))


def near(expected, spread):
    """Within four standard errors of a mean over COUNT draws."""
    return pytest.approx(expected, abs=4 * spread / math.sqrt(COUNT))


def test_uniform():
    position = (drawn("uniform") + 0.5) / 1000
    assert position.mean().item() == near(1 / 2, math.sqrt(1 / 12))
    for share in (0.1, 0.5, 0.8):
        assert (position < share).double().mean().item() == near(share, 0.5)


def test_cubic():
    """With t = 1 - u^3: E[t] = 1 - 1/4, P(t > p) = P(u < (1 - p)^(1/3)), E[t^2] = 1 - 2/4 + 1/7."""
    position = (drawn("cubic") + 0.5) / 1000
    assert position.mean().item() == near(3 / 4, math.sqrt(9 / 112))
    assert position.var().item() == pytest.approx(1 / 2 + 1 / 7 - 9 / 16, rel=0.03)
    for share in (0.1, 0.5, 0.8):
        assert (position > share).double().mean().item() == near((1 - share) ** (1 / 3), 0.5)


@pytest.mark.parametrize("sampling", ["uniform", "cubic"])
def test_timesteps_fill_the_range_and_stay_in_it(sampling):
    steps = drawn(sampling, steps=10)
    assert steps.dtype == torch.int64
    assert steps.unique().tolist() == list(range(10))


@pytest.mark.parametrize("sampling", ["uniform", "cubic"])
def test_timesteps_depend_on_the_generator_alone(sampling):
    torch.manual_seed(0)
    first = drawn(sampling, count=50)
    torch.manual_seed(1)
    assert torch.equal(drawn(sampling, count=50), first)
    assert not torch.equal(drawn(sampling, count=50, seed=1), first)


def test_u_of_zero_stays_in_range(monkeypatch):
    """1 - 0^3 is 1, and 1 * 1000 is no timestep."""
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.zeros(2, dtype=torch.float64))
    assert draw_timesteps("cubic", 2, 1000, torch.Generator()).tolist() == [999, 999]


class Recorder(nn.Module):
    """Stands in for a UNet: keeps what it was called with, and predicts 0.3 times the noisy latents."""

    def forward(self, **kwargs):
        self.kwargs = dict(kwargs)
        return (0.3 * kwargs["sample"],)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([0, 400, 999]),
        "prompt_embeds": torch.randn(3, 5, 6, generator=generator),
    }


def by_hand(batch, kind):
    """The loss from the schedule's definition: betas are squares of evenly spaced roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[batch["timesteps"]].reshape(-1, 1, 1, 1)
    signal, share = kept.sqrt(), (1 - kept).sqrt()
    latents, noise = batch["latents"].double(), batch["noise"].double()
    noisy = signal * latents + share * noise
    target = noise if kind == "epsilon" else signal * noise - share * latents
    return noisy, ((0.3 * noisy - target) ** 2).mean().item()


def loss_of(unet, scheduler, given, residuals=None):
    added = {} if residuals is None else {KEYWORD: residuals}
    return denoising_losses(tiny.base(tiny.unet(), scheduler), unet, **given, arguments=lambda noisy: added)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_is_the_mean_squared_error_by_hand(batch, kind, cls):
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    unet = Recorder()
    losses = loss_of(unet, scheduler, batch)
    noisy, expected = by_hand(batch, kind)
    assert losses.shape == (3,)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(unet.kwargs.pop("sample").double(), noisy, atol=1e-5)
    assert torch.equal(unet.kwargs.pop("timestep"), batch["timesteps"])
    assert unet.kwargs == {"encoder_hidden_states": batch["prompt_embeds"], "return_dict": False}


def test_residuals_are_passed_on(batch):
    unet, given = Recorder(), [torch.ones(3, 2, 8, 8), torch.ones(3, 4, 4, 4)]
    loss_of(unet, tiny.scheduler(), batch, given)
    received = unet.kwargs["down_intrablock_additional_residuals"]
    assert [id(tensor) for tensor in received] == [id(tensor) for tensor in given]


def test_the_arguments_follow_the_noisy_latents(batch):
    unet, seen = Recorder(), []
    base = tiny.base(tiny.unet())
    denoising_losses(base, unet, **batch, arguments=lambda noisy: seen.append(noisy) or {"more": 1})
    assert torch.equal(seen[0], unet.kwargs["sample"])
    assert unet.kwargs["more"] == 1


def test_the_error_is_taken_in_float32(batch):
    class Half(Recorder):
        def forward(self, *args, **kwargs):
            return (super().forward(*args, **kwargs)[0].bfloat16(),)

    assert loss_of(Half(), tiny.scheduler(), batch).dtype == torch.float32


def test_the_denoiser_is_called_in_its_own_precision(batch):
    unet = Recorder()
    losses = denoising_losses(tiny.base(tiny.unet()), unet, **batch, dtype=torch.bfloat16)
    assert unet.kwargs["sample"].dtype == unet.kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    assert losses.dtype == torch.float32


def test_other_prediction_types_are_named(batch):
    with refused("scheduler.prediction_type", "'sample'", expected="epsilon or v_prediction"):
        loss_of(Recorder(), DDIMScheduler(prediction_type="sample"), batch)


def test_gradients_reach_a_real_unet_and_its_residuals():
    unet = tiny.unet()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, tiny.TEXT_WIDTH, generator=generator)
    shapes = [(2, 8, 8, 8), (2, 16, 4, 4), (2, 24, 2, 2), (2, 24, 1, 1)]
    residuals = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    given = {"latents": latents, "noise": noise, "prompt_embeds": text}
    given["timesteps"] = torch.tensor([10, 900])
    loss = loss_of(unet, tiny.scheduler(), given, list(residuals)).mean()
    loss.backward()
    assert all(residual.grad is not None and residual.grad.abs().sum() > 0 for residual in residuals)
    assert unet.conv_in.weight.grad.abs().sum() > 0
    alone = loss_of(unet, tiny.scheduler(), given).mean()
    assert torch.equal(alone, loss)  # zeros add nothing
