"""The loss of a batch under a method: weights, dropout, and what the base is told."""

import pytest
import torch
from diffusers import DDPMScheduler
from tests import tiny
from torch import nn

from nexus_adapters.data.batch import Batch
from nexus_adapters.training.config import LossOptions
from nexus_adapters.training.loss import denoising_losses, min_snr_weights, timesteps_at
from nexus_adapters.training.methods import ControlNetMethod, FeatureMethod, build_adapter, method_of
from nexus_adapters.training.objective import Objective
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


def objective(unet=None, adapter=None, kind="epsilon", **loss):
    unet = unet or tiny.unet().requires_grad_(False)
    adapter = adapter or tiny.adapter(unet).requires_grad_(True).train()
    scheduler = DDPMScheduler(prediction_type=kind)
    return Objective(unet, scheduler, FeatureMethod(adapter, True), FULL, LossOptions(**loss))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_by_hand(kind):
    """Both weigh the clean latents' error by min(SNR, 5)."""
    scheduler = DDPMScheduler(prediction_type=kind)
    timesteps = torch.tensor([0, 100, 500, 999])
    kept = scheduler.alphas_cumprod[timesteps].double()
    snr = kept / (1 - kept)
    expected = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(min_snr_weights(scheduler, timesteps, 5.0).double(), expected, rtol=1e-4)
    assert expected[0] < 0.1
    assert expected[3] == pytest.approx(1 if kind == "epsilon" else expected[3])


def test_pure_noise_has_a_weight():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    assert min_snr_weights(scheduler, torch.tensor([999]), 5.0).tolist() == [1.0]
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert min_snr_weights(scheduler, torch.tensor([999]), 5.0).tolist() == [0.0]


def test_the_loss_is_weighed():
    plain, weighed = objective(), objective(min_snr_gamma=5.0)
    given = batch()
    timesteps = timesteps_at(given.u, "cubic", 1000)
    weights = min_snr_weights(plain.scheduler, timesteps, 5.0)
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
    noisy = made.scheduler.add_noise(given.latents, given.noise, timesteps)
    alone = made.unet(noisy, timesteps, given.prompt_embeds).sample
    expected = (alone - given.noise).square().mean(dim=(1, 2, 3))
    assert dropped[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert not torch.isclose(dropped[1], kept[1])
    assert torch.allclose(dropped[[0, 2]], kept[[0, 2]], rtol=1e-5)
    dropped[1].backward()
    gradients = [parameter.grad for parameter in made.method.module.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_module_runs_though_all_conditions_are_dropped():
    """DDP waits for the gradient of every parameter."""
    made = objective()
    made.of(batch(has_condition=torch.zeros(3, dtype=torch.bool))).backward()
    assert all(parameter.grad is not None for parameter in made.method.module.parameters())


def test_sdxl_is_told_its_sizes():
    seen = {}

    class Recorder(nn.Module):
        def forward(self, sample, timestep, **kwargs):
            seen.update(kwargs)
            return (sample,)

    added = {"text_embeds": torch.ones(3, tiny.TEXT_WIDTH), "time_ids": torch.ones(3, 6)}
    adapter = tiny.adapter(tiny.unet())
    objective(Recorder(), adapter).of(batch(added=added))
    assert seen["added_cond_kwargs"] == added
    objective(Recorder(), adapter).of(batch())


@pytest.mark.parametrize("method", ["prime", "slim", "t2i"])
@pytest.mark.parametrize("config", [tiny.SD15_UNET, tiny.SDXL_UNET], ids=["sd15", "sdxl"])
def test_every_method_fits_its_unet(method, config):
    unet = tiny.unet(config)
    adapter = build_adapter(method, unet)
    if method == "t2i":
        features = adapter(tiny.condition(1, 128, 128))
    else:
        text = torch.randn(1, tiny.TOKENS, config["cross_attention_dim"])
        features = adapter(tiny.condition(1, 128, 128), text)
    assert len(features) == 4
    assert adapter.config["unshuffle" if method != "t2i" else "downscale_factor"] in (8, 16)


def test_a_controlnet_starts_as_the_base_and_learns():
    unet = tiny.unet().requires_grad_(False)
    controlnet = build_adapter("controlnet", unet).train()
    method = method_of(controlnet)
    assert isinstance(method, ControlNetMethod)
    under = Objective(unet, DDPMScheduler(), method, FULL, LossOptions())
    timesteps = torch.tensor([10, 400, 900])
    plain = denoising_losses(
        unet, DDPMScheduler(), batch().latents, batch().noise, timesteps, batch().prompt_embeds, lambda _: {}
    )
    assert torch.allclose(under.at(batch(), timesteps), plain)  # its last layers are zero
    under.of(batch()).backward()
    assert all(p.grad is None for p in unet.parameters())
    assert controlnet.controlnet_mid_block.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in (
            controlnet.controlnet_mid_block.weight,
            controlnet.controlnet_down_blocks[0].weight,
        ):
            parameter.add_(0.1 * torch.randn_like(parameter))
        changed = under.at(batch(), timesteps)
        assert not torch.isclose(changed, plain).any()
        dropped = batch(has_condition=torch.tensor([True, False, True]))
        mixed = under.at(dropped, timesteps)
    assert torch.isclose(mixed, plain).tolist() == [False, True, False]
    assert torch.allclose(mixed[[0, 2]], changed[[0, 2]])


@pytest.mark.parametrize(("factor", "channels"), [(2, (96, 256)), (4, (32, 96, 256)), (8, (16, 32, 96, 256))])
def test_a_controlnet_shrinks_its_condition_as_the_vae_does(factor, channels):
    controlnet = build_adapter("controlnet", tiny.unet(), vae_scale_factor=factor)
    assert tuple(controlnet.config.conditioning_embedding_out_channels) == channels
    embedded = controlnet.controlnet_cond_embedding(torch.rand(1, 3, 64, 64))
    assert embedded.shape[-2:] == (64 // factor, 64 // factor)
    with pytest.raises(ValueError, match=r"^adapter.method: expected a VAE that shrinks by 2, 4 or 8"):
        build_adapter("controlnet", tiny.unet(), vae_scale_factor=16)


def test_t2i_has_two_shapes_only():
    unet = tiny.unet(down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3)
    build_adapter("prime", unet)
    with pytest.raises(ValueError, match=r"^adapter.method: expected a UNet that pools as .*; received"):
        build_adapter("t2i", unet)


@pytest.mark.parametrize("method", ["prime", "t2i"])
def test_features_fade_with_each_samples_noise(method):
    unet = tiny.unet().requires_grad_(False)
    torch.manual_seed(0)
    scheduler = DDPMScheduler()
    constant, fading = (build_adapter(method, unet, shape={"noise_exponent": p}) for p in (0.0, 2.0))
    fading.load_state_dict(constant.state_dict())
    timesteps, given = torch.tensor([10, 400, 900]), batch()
    plain, faded = (
        method_of(adapter, None, scheduler).unet_arguments(
            given, given.latents, timesteps, given.prompt_embeds
        )["down_intrablock_additional_residuals"]
        for adapter in (constant, fading)
    )
    factors = (1 - scheduler.alphas_cumprod[timesteps]).square()[:, None, None, None]
    assert all(torch.allclose(theirs * factors, ours) for ours, theirs in zip(faded, plain, strict=True))
