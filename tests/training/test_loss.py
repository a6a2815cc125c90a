"""The denoising loss, and that of a batch under a method: weights, dropout, and what the denoiser gets."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tests import tiny
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases.unet import KEYWORD
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import method_of
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.loss import Objective, denoising_losses, timesteps_at
from nexus_adapters.training.precision import Precision

FULL = Precision("cpu", torch.float32)


def sampled(sampling, steps=1000, band=(0.0, 1.0)):
    """The timesteps of evenly spaced numbers, each in the middle of its interval."""
    return timesteps_at((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000, sampling, steps, band)


def test_uniform():
    assert torch.equal(sampled("uniform", 10).bincount(), torch.full((10,), 4000))


def test_cubic():
    """With t = 1 - u^3: E[t] = 1 - 1/4, P(t > p) = P(u < (1 - p)^(1/3)), E[t^2] = 1 - 2/4 + 1/7."""
    position = (sampled("cubic") + 0.5) / 1000
    assert position.mean().item() == pytest.approx(3 / 4, abs=1e-3)
    assert position.var().item() == pytest.approx(1 / 2 + 1 / 7 - 9 / 16, abs=1e-3)
    for share in (0.1, 0.5, 0.8):
        assert (position > share).double().mean().item() == pytest.approx((1 - share) ** (1 / 3), abs=1e-3)


@pytest.mark.parametrize("sampling", ["uniform", "cubic"])
def test_timesteps_fill_the_range_and_stay_in_it(sampling):
    steps = sampled(sampling, 10)
    assert steps.dtype == torch.int64
    assert steps.unique().tolist() == list(range(10))


def test_u_of_zero_stays_in_range():
    """1 - 0^3 is 1, and 1 * 1000 is no timestep."""
    assert timesteps_at(torch.zeros(2, dtype=torch.float64), "cubic", 1000).tolist() == [999, 999]


@pytest.mark.parametrize("sampling", ["uniform", "cubic"])
def test_a_band_keeps_timesteps_inside(sampling):
    assert sampled(sampling, band=(0.2, 0.6)).unique().tolist() == list(range(200, 600))


class Recorder(nn.Module):
    """Stands in for a UNet: keeps what it was called with, and predicts 0.3 times the noisy latents."""

    def forward(self, **kwargs):
        self.kwargs = dict(kwargs)
        return (0.3 * kwargs["sample"],)


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": torch.tensor([0, 400, 999]),
        "prompt_embeds": torch.randn(3, 5, 6, generator=generator),
    }


def by_hand(given, kind):
    """The loss from the schedule's definition: betas are squares of evenly spaced roots."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[given["timesteps"]].reshape(-1, 1, 1, 1)
    signal, share = kept.sqrt(), (1 - kept).sqrt()
    latents, noise = given["latents"].double(), given["noise"].double()
    noisy = signal * latents + share * noise
    target = noise if kind == "epsilon" else signal * noise - share * latents
    return noisy, ((0.3 * noisy - target) ** 2).mean().item()


def loss_of(unet, scheduler, given, residuals=None):
    added = {} if residuals is None else {KEYWORD: residuals}
    return denoising_losses(tiny.base(tiny.unet(), scheduler), unet, **given, arguments=lambda noisy: added)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_is_the_mean_squared_error_by_hand(given, kind, cls):
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    unet = Recorder()
    losses = loss_of(unet, scheduler, given)
    noisy, expected = by_hand(given, kind)
    assert losses.shape == (3,)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(unet.kwargs.pop("sample").double(), noisy, atol=1e-5)
    assert torch.equal(unet.kwargs.pop("timestep"), given["timesteps"])
    assert unet.kwargs == {"encoder_hidden_states": given["prompt_embeds"], "return_dict": False}


def test_residuals_are_passed_on(given):
    unet, residuals = Recorder(), [torch.ones(3, 2, 8, 8), torch.ones(3, 4, 4, 4)]
    loss_of(unet, tiny.scheduler(), given, residuals)
    received = unet.kwargs["down_intrablock_additional_residuals"]
    assert [id(tensor) for tensor in received] == [id(tensor) for tensor in residuals]


def test_the_arguments_follow_the_noisy_latents(given):
    unet, seen = Recorder(), []
    base = tiny.base(tiny.unet())
    denoising_losses(base, unet, **given, arguments=lambda noisy: seen.append(noisy) or {"more": 1})
    assert torch.equal(seen[0], unet.kwargs["sample"])
    assert unet.kwargs["more"] == 1


def test_the_error_is_taken_in_float32(given):
    class Half(Recorder):
        def forward(self, *args, **kwargs):
            return (super().forward(*args, **kwargs)[0].bfloat16(),)

    assert loss_of(Half(), tiny.scheduler(), given).dtype == torch.float32


def test_the_denoiser_is_called_in_its_own_precision(given):
    unet = Recorder()
    losses = denoising_losses(tiny.base(tiny.unet()), unet, **given, dtype=torch.bfloat16)
    assert unet.kwargs["sample"].dtype == unet.kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    assert losses.dtype == torch.float32


def test_other_prediction_types_are_named(given):
    with refused("scheduler.prediction_type", "'sample'", expected="epsilon or v_prediction"):
        loss_of(Recorder(), DDIMScheduler(prediction_type="sample"), given)


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


def batch(count=3, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    given = {
        "indices": torch.arange(count),
        "latents": latents,
        "noise": noise,
        "u": torch.rand(count, generator=generator, dtype=torch.float64),
        "condition": tiny.condition(count),
        "has_condition": torch.ones(count, dtype=torch.bool),
        "prompt_embeds": torch.randn(count, tiny.TOKENS, tiny.TEXT_WIDTH, generator=generator),
    }
    return Batch(**given | changes)


def objective(unet=None, adapter=None, kind="epsilon", adapter_prompt=None, **loss):
    unet = unet or tiny.unet().requires_grad_(False)
    adapter = adapter or tiny.adapter(unet).requires_grad_(True).train()
    base = tiny.base(unet, DDPMScheduler(prediction_type=kind))
    method = method_of(adapter)
    network, places = method.network(adapter, unet), FeaturePlaces(unet, base.places())
    called = network if method.is_fused else unet
    return Objective(base, called, places, method, network, FULL, LossOptions(**loss), adapter_prompt)


def base_of_kind(kind="epsilon", **changes):
    return tiny.base(tiny.unet(), DDPMScheduler(prediction_type=kind, **changes))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("epsilon", [5 / 9999, 5 / 99, 1.0, 1.0]), ("v_prediction", [5 / 10000, 5 / 100, 1 / 2, 0.25 / 1.25])],
)
def test_min_snr_weights(kind, expected):
    """min(SNR, 5) / SNR for epsilon, and / (SNR + 1) for v-prediction, at SNRs of 9999, 99, 1 and 1/4."""
    base = base_of_kind(kind, trained_betas=betas_of([0.9999, 0.99, 0.5, 0.2]), num_train_timesteps=4)
    assert base.loss_weights(torch.arange(4), 5.0).tolist() == pytest.approx(expected, rel=1e-3)


def betas_of(kept):
    """Of a schedule that keeps these shares of the signal's variance."""
    return [1 - share / before for share, before in zip(kept, [1.0, *kept[:-1]], strict=True)]


@pytest.mark.parametrize(("kind", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_pure_noise_has_a_weight(kind, weight):
    base = base_of_kind(kind, rescale_betas_zero_snr=True)
    assert base.loss_weights(torch.tensor([999]), 5.0).tolist() == [weight]


def test_the_loss_is_weighed():
    plain, weighed = objective(), objective(min_snr_gamma=5.0)
    given = batch()
    timesteps = timesteps_at(given.u, "cubic", 1000)
    weights = plain.base.loss_weights(timesteps, 5.0)
    assert weighed.of(given).item() == pytest.approx((plain.at(given, timesteps) * weights).mean().item())
    assert plain.of(given).item() == pytest.approx(plain.at(given, timesteps).mean().item())


def test_a_dropped_condition_is_the_base_alone():
    """Its row's loss is that without an adapter, and the adapter gets no gradient of it."""
    made = objective()
    has_condition = torch.tensor([True, False, True])
    given, timesteps = batch(has_condition=has_condition), torch.tensor([10, 500, 900])
    dropped, kept = made.at(given, timesteps), made.at(batch(), timesteps)
    noisy = made.base.scheduler.add_noise(given.latents, given.noise, timesteps)
    alone = made.denoiser(noisy, timesteps, given.prompt_embeds).sample
    expected = (alone - given.noise).square().mean(dim=(1, 2, 3))
    assert dropped[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert not torch.isclose(dropped[1], kept[1])
    assert torch.allclose(dropped[[0, 2]], kept[[0, 2]], rtol=1e-5)
    dropped[1].backward()
    gradients = [parameter.grad for parameter in made.module.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_module_runs_though_all_conditions_are_dropped():
    """DDP waits for the gradient of every parameter."""
    made = objective()
    made.of(batch(has_condition=torch.zeros(3, dtype=torch.bool))).backward()
    assert all(parameter.grad is not None for parameter in made.module.parameters())


def test_an_adapter_may_read_the_empty_prompt_in_place_of_every_other():
    """The base still reads the prompts."""
    read, base_read = [], []
    unet = tiny.unet().requires_grad_(False)
    unet.register_forward_pre_hook(
        lambda _, __, given: base_read.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    adapter = tiny.adapter(unet)
    adapter.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    empty, given = torch.randn(1, tiny.TOKENS, tiny.TEXT_WIDTH), batch()
    blind = objective(unet, adapter, adapter_prompt=empty).of(given)
    assert torch.equal(read[0], empty.expand(3, -1, -1))
    assert torch.equal(base_read[0], given.prompt_embeds)
    assert not torch.isclose(blind, objective(unet, adapter).of(given))


class Called(nn.Module):
    """In place of a UNet: keeps its last keyword arguments."""

    def forward(self, sample, timestep, **kwargs):
        self.kwargs = kwargs
        return (sample,)


def test_sdxl_gets_its_sizes():
    added = {"text_embeds": torch.ones(3, tiny.TEXT_WIDTH), "time_ids": torch.ones(3, 6)}
    made = replace(objective(), denoiser=Called())
    made.of(batch(added=added))
    assert made.denoiser.kwargs["added_cond_kwargs"] == added
    made.of(batch())
    assert "added_cond_kwargs" not in made.denoiser.kwargs


@pytest.mark.parametrize("has_condition", [True, False])
def test_a_step_leaves_nothing_in_the_unet(has_condition):
    made = objective()
    given, timesteps = batch(), torch.tensor([10, 500, 900])
    noisy = made.base.scheduler.add_noise(given.latents, given.noise, timesteps)
    before = made.denoiser(noisy, timesteps, given.prompt_embeds).sample
    made.at(batch(has_condition=torch.full((3,), has_condition)), timesteps)
    assert torch.equal(made.denoiser(noisy, timesteps, given.prompt_embeds).sample, before)
