"""The loss of a batch under a method: weights, dropout, and what the denoiser is called with."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from tests import tiny
from torch import nn

from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import method_of
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.loss import Objective, timesteps_at
from nexus_adapters.training.precision import Precision

FULL = Precision("cpu", torch.float32)


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


def objective(unet=None, adapter=None, kind="epsilon", reads_instead=None, **loss):
    unet = unet or tiny.unet().requires_grad_(False)
    adapter = adapter or tiny.adapter(unet).requires_grad_(True).train()
    base = tiny.base(unet, DDPMScheduler(prediction_type=kind))
    method = method_of(adapter)
    network, places = method.network(adapter, unet), FeaturePlaces(unet, base.places())
    called = network if method.is_fused else unet
    return Objective(base, called, places, method, network, FULL, LossOptions(**loss), reads_instead)


def base_of_kind(kind="epsilon", **changes):
    return tiny.base(tiny.unet(), DDPMScheduler(prediction_type=kind, **changes))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_by_hand(kind):
    """Both weigh the clean latents' error by min(SNR, 5)."""
    base = base_of_kind(kind)
    timesteps = torch.tensor([0, 100, 500, 999])
    kept = base.scheduler.alphas_cumprod[timesteps].double()
    snr = kept / (1 - kept)
    expected = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(base.loss_weights(timesteps, 5.0).double(), expected, rtol=1e-4)
    assert expected[0] < 0.1
    assert expected[3] == pytest.approx(1 if kind == "epsilon" else expected[3])


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


def test_a_band_keeps_timesteps_inside():
    u = torch.rand(10_000, dtype=torch.float64)
    for sampling in ("uniform", "cubic"):
        drawn = timesteps_at(u, sampling, 1000, (0.2, 0.6))
        assert 200 <= drawn.min() < 205
        assert 595 < drawn.max() <= 600


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
    read, told = [], []
    unet = tiny.unet().requires_grad_(False)
    unet.register_forward_pre_hook(
        lambda _, __, given: told.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    adapter = tiny.adapter(unet)
    adapter.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    empty, given = torch.randn(1, tiny.TOKENS, tiny.TEXT_WIDTH), batch()
    blind = objective(unet, adapter, reads_instead=empty).of(given)
    assert torch.equal(read[0], empty.expand(3, -1, -1))
    assert torch.equal(told[0], given.prompt_embeds)
    assert not torch.isclose(blind, objective(unet, adapter).of(given))


class Recorder(nn.Module):
    """In place of a UNet."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, sample, timestep, **kwargs):
        self.seen.update(kwargs)
        return (sample,)


def test_sdxl_is_told_its_sizes():
    added = {"text_embeds": torch.ones(3, tiny.TEXT_WIDTH), "time_ids": torch.ones(3, 6)}
    made, seen = objective(), {}
    made = replace(made, denoiser=Recorder(seen))
    made.of(batch(added=added))
    assert seen["added_cond_kwargs"] == added
    seen.clear()
    made.of(batch())
    assert "added_cond_kwargs" not in seen


@pytest.mark.parametrize("has_condition", [True, False])
def test_a_step_leaves_nothing_in_the_unet(has_condition):
    made = objective()
    given, timesteps = batch(), torch.tensor([10, 500, 900])
    noisy = made.base.scheduler.add_noise(given.latents, given.noise, timesteps)
    before = made.denoiser(noisy, timesteps, given.prompt_embeds).sample
    made.at(batch(has_condition=torch.full((3,), has_condition)), timesteps)
    assert torch.equal(made.denoiser(noisy, timesteps, given.prompt_embeds).sample, before)
