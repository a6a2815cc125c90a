from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused
from tests.training.test_loss import batch, objective

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.methods import GenerationSettings, find_method, method_of
from nexus_adapters.training.loss import denoising_losses


def test_a_controlnet_starts_as_the_base_and_learns():
    unet = tiny.unet().requires_grad_(False)
    controlnet = build("controlnet", unet).train()
    assert method_of(controlnet) is find_method("controlnet")
    under, timesteps, given = objective(unet, controlnet), torch.tensor([10, 400, 900]), batch()
    plain = denoising_losses(under.base, unet, given.latents, given.noise, timesteps, given.prompt_embeds)
    assert torch.allclose(under.at(given, timesteps), plain)  # its last layers are zero
    under.of(given).backward()
    assert all(p.grad is None for p in unet.parameters())
    assert controlnet.controlnet_mid_block.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in (
            controlnet.controlnet_mid_block.weight,
            controlnet.controlnet_down_blocks[0].weight,
        ):
            parameter.add_(0.1 * torch.randn_like(parameter))
        changed = under.at(given, timesteps)
        assert not torch.isclose(changed, plain).any()
        dropped = batch(has_condition=torch.tensor([True, False, True]))
        mixed = under.at(dropped, timesteps)
    assert torch.isclose(mixed, plain).tolist() == [False, True, False]
    assert torch.allclose(mixed[[0, 2]], changed[[0, 2]])


@pytest.mark.parametrize(("levels", "channels"), [(2, (96, 256)), (3, (32, 96, 256)), (4, (16, 32, 96, 256))])
def test_a_controlnet_shrinks_its_condition_as_the_vae_does(levels, channels):
    controlnet = build("controlnet", vae_levels=levels)
    assert tuple(controlnet.config.conditioning_embedding_out_channels) == channels
    embedded = controlnet.controlnet_cond_embedding(torch.rand(1, 3, 64, 64))
    factor = 2 ** (levels - 1)
    assert embedded.shape[-2:] == (64 // factor, 64 // factor)
    with refused("base", "16", expected="a VAE that shrinks by 2, 4 or 8, for method controlnet"):
        build("controlnet", vae_levels=5)


@pytest.mark.parametrize("method", ["controlnet", "controlnet-xs"])
@pytest.mark.parametrize(
    ("changes", "received"),
    [({"cross_attention_dim": 24}, "16"), ({"block_out_channels": (8, 16, 24, 32)}, "24")],
)
def test_another_bases_controlnet_does_not_fit(method, changes, received):
    options = {"size_ratio": 1.0} if method == "controlnet-xs" else {}
    adapter = build(method, **options)
    find_method(method).check_fit(adapter, tiny.base(tiny.unet()))
    with refused("adapter", received, expected=next(iter(changes))):
        find_method(method).check_fit(adapter, tiny.base(tiny.unet(**changes)))


def test_a_controlnet_of_another_base_is_named():
    """From its config, before its weights are read."""
    widths = {"SD 1.x": 768, "SD 2.x": 1024, "SDXL": 2048}
    for made_for, text_width in widths.items():
        config = {"in_channels": 4, "cross_attention_dim": text_width, "block_out_channels": [8, 16, 24, 24]}
        saved = Saved("mine", Path(), config, ())
        for name, width in widths.items():
            with torch.device("meta"):
                base = tiny.base(tiny.unet(cross_attention_dim=width))
            if name == made_for:
                find_method("controlnet").check_saved(saved, base)
                continue
            with refused("adapter", f"an adapter for {made_for}", expected=f"an adapter for {name}"):
                find_method("controlnet").check_saved(saved, base)


@pytest.mark.parametrize("method", ["controlnet", "controlnet-xs"])
def test_it_reads_the_prompt_that_the_base_reads(method):
    """No other can be given to it, and none is ignored."""
    options = {"size_ratio": 1.0} if method == "controlnet-xs" else {}
    pipe, adapter = tiny.sd15(), build(method, **options)
    settings = GenerationSettings(adapter_prompts=["another"])
    with refused("adapter_prompts"), find_method(method).generating(pipe, adapter, [tiny.image()], settings):
        pass
