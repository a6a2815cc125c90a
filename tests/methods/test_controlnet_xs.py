import pytest
import torch
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.methods import find_method
from nexus_adapters.methods.controlnet_xs import (
    ReshapedControlNetXS,
    build_controlnet_xs,
    controlled_by_xs,
    fuse,
)

CHANNELS = (16, 32, 96, 256)
TIMES = torch.tensor([500, 20])
STOCK = {"layers_per_block": 2}


def trained(adapter, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter.eval()


def inputs(channels=4):
    torch.manual_seed(6)
    return {
        "sample": torch.randn(2, channels, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": torch.randn(2, 7, tiny.TEXT_WIDTH),
        "return_dict": False,
    }


CONDITION = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_a_stock_base_gets_diffusers_adapter_and_its_output():
    unet = tiny.unet(**STOCK)
    adapter = trained(build_controlnet_xs(unet, 0.5, CHANNELS))
    assert type(adapter) is ControlNetXSAdapter
    theirs = UNetControlNetXSModel.from_unet(unet, adapter).eval()
    plain = unet(**inputs())[0]
    for scale in (1.0, 0.3):
        given = {"controlnet_cond": CONDITION, "conditioning_scale": scale}
        ours = fuse(unet, adapter).eval()(**inputs(), **given)[0]
        # Not to the bit: diffusers' copy of the base has another epsilon in its norms than the base.
        assert torch.allclose(ours, theirs(**inputs(), **given)[0], atol=2e-4)
        assert (ours - plain).abs().max() > 0.01


def test_a_base_with_more_layers_is_refused():
    with refused("base", "3", expected="at most 2 layers per block"):
        build_controlnet_xs(tiny.unet(layers_per_block=3), 0.5, CHANNELS)


@pytest.mark.parametrize(
    ("layers", "channels"),
    [
        (2, 4),
        (1, 12),
        pytest.param(1, 4, marks=pytest.mark.full),
        pytest.param(2, 12, marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_bases_of_any_shape_start_as_they_are(layers, channels, tmp_path):
    unet = tiny.unet(layers_per_block=layers, in_channels=channels, out_channels=channels)
    adapter = build_controlnet_xs(unet, 0.5, CHANNELS)
    plain = unet(**inputs(channels))[0]
    assert torch.equal(fuse(unet, adapter)(**inputs(channels), controlnet_cond=CONDITION)[0], plain)
    changed = fuse(unet, trained(adapter))(**inputs(channels), controlnet_cond=CONDITION)[0]
    assert not torch.isclose(changed, plain).all()
    adapter.save_pretrained(tmp_path)
    kind = ControlNetXSAdapter if (layers, channels) == (2, 4) else ReshapedControlNetXS
    loaded = kind.from_pretrained(tmp_path).eval()
    again = fuse(unet, loaded)(**inputs(channels), controlnet_cond=CONDITION)[0]
    assert torch.allclose(again, changed, atol=1e-6), (again - changed).abs().max()


def test_base_and_adapter_keep_their_parts():
    unet = tiny.unet().requires_grad_(False)
    adapter = build_controlnet_xs(unet, 1.0, CHANNELS)
    fused = fuse(unet, adapter)
    fused(**inputs(), controlnet_cond=CONDITION)[0].sum().backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert adapter.control_to_base_for_conv_in.weight.grad.abs().sum() > 0


def test_each_row_of_a_scale_is_its_own():
    unet = tiny.unet()
    adapter = trained(build_controlnet_xs(unet, 1.0, CHANNELS))
    fused = fuse(unet, adapter)
    with torch.no_grad():
        plain, full = unet(**inputs())[0], fused(**inputs(), controlnet_cond=CONDITION)[0]
        scale = torch.tensor([0.0, 1.0])[:, None, None, None]
        mixed = fused(**inputs(), controlnet_cond=CONDITION, conditioning_scale=scale)[0]
    assert torch.allclose(mixed[0], plain[0], atol=1e-6)
    assert torch.allclose(mixed[1], full[1], atol=1e-6)


def test_a_pipeline_is_controlled_while_the_block_is_open():
    pipe = tiny.sd15()
    adapter = trained(build_controlnet_xs(pipe.unet, 1.0, CHANNELS))
    arguments = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}

    def draw():
        return pipe("a red star", generator=torch.Generator().manual_seed(0), **arguments).images

    plain = draw()
    with controlled_by_xs(pipe, adapter, tiny.image(), scale=0.0):
        assert torch.allclose(draw(), plain, atol=1e-5)
    with controlled_by_xs(pipe, adapter, tiny.image()):
        assert not torch.allclose(draw(), plain, atol=1e-3)
    assert torch.equal(draw(), plain)


def test_ratios_that_the_heads_do_not_divide_are_refused():
    with refused("size_ratio", "0.1, which gives (0, 1, 2, 2)", expected="(2, 2, 2, 2) attention heads"):
        build_controlnet_xs(tiny.unet(), 0.1, CHANNELS)


@pytest.mark.parametrize(("levels", "channels"), [(2, (96, 256)), (3, (32, 96, 256)), (4, (16, 32, 96, 256))])
def test_it_shrinks_its_condition_as_the_vae_does(levels, channels):
    adapter = build("controlnet-xs", vae_levels=levels, size_ratio=1.0)
    assert tuple(adapter.config.conditioning_embedding_out_channels) == channels
    with refused("base", "16", expected="shrinks by 2, 4 or 8, for method controlnet-xs"):
        build("controlnet-xs", vae_levels=5, size_ratio=1.0)


@pytest.mark.parametrize("ratio", [0.1, 0.125, 0.3, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("widths", [(8, 16, 24, 24), (56, 98, 98, 196)])
def test_it_takes_over_the_size_of_its_start(widths, ratio, tmp_path):
    """As a ratio that gives the same channels; one that gives others contradicts it."""
    method = find_method("controlnet-xs")
    own = [int(width * ratio) for width in widths]
    config = {"_class_name": "ControlNetXSAdapter"}
    config |= {"block_out_channels": own, "base_block_out_channels": list(widths)}
    start = Saved("start", tmp_path, config, ())
    if min(own) == 0:  # no adapter has such
        with refused("start_from", "'start'"):
            method.adopt(method.Options(method="controlnet-xs"), start)
        return
    found = method.adopt(method.Options(method="controlnet-xs"), start).size_ratio
    assert [int(width * found) for width in widths] == own
    given = method.Options(method="controlnet-xs", size_ratio=ratio)
    assert method.adopt(given, start) == given
    with refused("size_ratio", "2.0", expected="'start'"):
        method.adopt(method.Options(method="controlnet-xs", size_ratio=2.0), start)


@pytest.mark.parametrize("base", [None, [8, 16], [8, 0, 24], [24, 16, 8]])
def test_a_start_of_no_fraction_of_its_base(base, tmp_path):
    config = {"_class_name": "ControlNetXSAdapter", "block_out_channels": [2, 4, 6]}
    config |= {"base_block_out_channels": base}
    method = find_method("controlnet-xs")
    with refused("start_from", str(base)):
        method.adopt(method.Options(method="controlnet-xs"), Saved("start", tmp_path, config, ()))


def test_without_a_start_it_has_an_eighth():
    unet = tiny.unet(attention_head_dim=1)
    default, written = (build("controlnet-xs", unet, **given) for given in ({}, {"size_ratio": 0.125}))
    assert default.config.block_out_channels == written.config.block_out_channels == (1, 2, 3, 3)
