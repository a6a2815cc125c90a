"""Adapter and UNet: what fits, what does not, and that features meet the UNet's maps at every size."""

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter, UNet2DConditionModel
from tests import tiny
from tests.refusals import refused

from nexus_adapters import Control, NexusAdapter, attach
from nexus_adapters.adapter.arguments import base_geometry
from nexus_adapters.bases.families import base_of
from nexus_adapters.injection.compatibility import (
    check_fit,
    geometry_of,
    geometry_of_config,
    match_places,
    pixels_per_latent,
)
from nexus_adapters.injection.fit import fit_condition


def based(unet):
    return base_of(unet)[0]


SHAPES = {"sd15": tiny.SD15_UNET, "sdxl": tiny.SDXL_UNET}
# The middle block takes the fourth feature of SDXL's three down blocks.
PLACES = {"sd15": 4, "sdxl": 4}


def place_maps(unet, latents):
    """The sizes of the maps to which the UNet adds, seen while it runs."""
    seen = []
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            block.attentions[-1].register_forward_hook(lambda m, a, out: seen.append(out[0].shape[-2:]))
        else:
            block.register_forward_hook(lambda m, a, out: seen.append(out[0].shape[-2:]))
    unet.mid_block.register_forward_hook(lambda m, a, out: seen.append(out.shape[-2:]))
    text = torch.zeros(1, 2, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.zeros(1, tiny.TEXT_WIDTH), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        unet(latents, 1, text, added_cond_kwargs=added)
    return [tuple(size) for size in seen]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"downsample_padding": 0}], ids=["rounds up", "rounds down"])
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (13, 10), (25, 8), (11, 23)])
def test_places_are_where_the_unet_has_them(shape, changes, size):
    unet = tiny.unet(SHAPES[shape], **changes)
    found = place_maps(unet, torch.zeros(1, 4, *size))
    assert based(unet).feature_sizes(*size) == found[: PLACES[shape]]


@pytest.mark.parametrize("shape", SHAPES)
def test_features_fit_at_every_multiple_of_8(shape):
    """All heights from 8 to 200 pixels, each with another width."""
    unet = tiny.unet(SHAPES[shape])
    adapter = tiny.adapter(unet)
    base = based(unet)
    assert pixels_per_latent(adapter, base) == 8
    unshuffle = geometry_of(adapter).unshuffle
    text = torch.zeros(1, 2, adapter.config.text_width)
    for height in range(1, 26):
        width = 1 + (height * 7) % 25
        condition = fit_condition(torch.zeros(1, 3, height * 8, width * 8), height * 8, width * 8, unshuffle)
        with torch.no_grad():
            features = adapter(condition, text)
        sizes = [tuple(f.shape[-2:]) for f in match_places(features, base, 1, height, width)]
        assert sizes == base.feature_sizes(height, width) == [tuple(f.shape[-2:]) for f in features]


@pytest.mark.parametrize("shape", SHAPES)
def test_surplus_rows_are_cut_where_the_unet_rounds_down(shape):
    unet = tiny.unet(SHAPES[shape], downsample_padding=0)
    adapter = tiny.adapter(unet)
    text = torch.zeros(1, 2, adapter.config.text_width)
    condition = fit_condition(torch.rand(1, 3, 104, 120), 104, 120, adapter.config.unshuffle)
    with torch.no_grad():
        features = adapter(condition, text)
    matched = match_places(features, based(unet), 1, 13, 15)
    for whole, cut in zip(features, matched, strict=True):
        assert torch.equal(whole[:, :, : cut.shape[2], : cut.shape[3]], cut)
    assert [tuple(f.shape[-2:]) for f in matched] == based(unet).feature_sizes(13, 15)


def test_both_numbers_are_named():
    sd15, sdxl = tiny.unet(tiny.SD15_UNET), tiny.unet(tiny.SDXL_UNET)
    adapter = tiny.adapter(sd15)
    check_fit(adapter, based(sd15))
    with refused("adapter", "(8, 16, 32, 32)", expected="channels (8, 16, 24, 24)"):
        check_fit(tiny.adapter(sd15, channels=(8, 16, 32, 32)), based(sd15))
    with refused("adapter", "3", expected="number of features 4"):
        check_fit(tiny.adapter(sd15, channels=(8, 16, 24), pools=(0, 1, 1)), based(sd15))
    with refused("adapter", "20", expected="text_width 16"):
        check_fit(tiny.adapter(sd15, text_width=20), based(sd15))
    with refused("adapter", "(0, 0, 1, 1)", expected="pools (0, 0, 1, 0)"):
        check_fit(tiny.adapter(sdxl, pools=(0, 0, 1, 1), unshuffle=8), based(sdxl))
    with refused("adapter", "15", expected="multiple of 2"):
        check_fit(tiny.adapter(sdxl, unshuffle=15), based(sdxl))


def base_named(name):
    """The base of a true config: no weights are needed."""
    sd = tiny.SD15_UNET | {"block_out_channels": (320, 640, 1280, 1280)}
    xl = tiny.SDXL_UNET | {"block_out_channels": (320, 640, 1280)}
    changes = {
        "SD 1.x": sd | {"cross_attention_dim": 768},
        "SD 2.x": sd | {"cross_attention_dim": 1024},
        "SDXL": xl | {"cross_attention_dim": 2048},
        "the embedded base": sd | {"block_out_channels": (96, 96, 96, 128), "cross_attention_dim": 160},
        "Kolors": xl | {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"},
    }[name]
    with torch.device("meta"):
        return based(UNet2DConditionModel(**changes))


def adapter_for(base, kind):
    sizes = {"channels": [p.channels for p in base.places()], "in_channels": 3}
    first = base.places()[0].stride
    with torch.device("meta"):
        if kind == "nexus":
            return NexusAdapter.for_geometry(base_geometry(base, pixels_per_latent=8), "prime")
        is_xl = "_xl" if first == 2 else ""
        return T2IAdapter(**sizes, downscale_factor=8 * first, adapter_type=f"full_adapter{is_xl}")


NAMES = ("SD 1.x", "SD 2.x", "SDXL", "Kolors", "the embedded base")


@pytest.mark.parametrize("made_for", NAMES)
@pytest.mark.parametrize("kind", ["nexus", "t2i"])
def test_the_base_that_an_adapter_was_made_for_is_named(made_for, kind):
    of_t2i = {"SD 1.x": "SD 1.x/2.x", "SD 2.x": "SD 1.x/2.x", "Kolors": "SDXL"}  # they read no text
    adapter = adapter_for(base_named(made_for), kind)
    check_fit(adapter, base_named(made_for))
    for name in NAMES:
        base = base_named(name)
        assert base.known_as == name
        if kind == "t2i" and of_t2i.get(name, name) == of_t2i.get(made_for, made_for):
            check_fit(adapter, base)  # reads no text
            continue
        if name != made_for:
            shown = made_for if kind == "nexus" else of_t2i.get(made_for, made_for)
            with refused(
                "adapter", f"an adapter for {shown}", expected=f"an adapter for {name}, to match the base"
            ):
                check_fit(adapter, base)


def test_tiny_bases_are_named_by_their_shape():
    sd15, sdxl = tiny.unet(tiny.SD15_UNET), tiny.unet(tiny.SDXL_UNET)
    with refused("adapter", "an adapter for SD 1.x/2.x", expected="an adapter for SDXL"):
        check_fit(tiny.adapter(sd15), based(sdxl))
    with refused("adapter", "an adapter for SDXL", expected="an adapter for SD 1.x/2.x"):
        check_fit(tiny.adapter(sdxl), based(sd15))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"unshuffle": 8},
        {"unshuffle": 8, "in_channels": 3, "channels": 4},
        {"unshuffle": "8", "in_channels": 3, "channels": [4]},
        {"unshuffle": 8, "in_channels": 3, "channels": [4, None]},
        {"unshuffle": 8, "in_channels": 3, "channels": [4], "pools": {"a": 1}},
        {"unshuffle": 8, "in_channels": None, "channels": [4]},
        {"unshuffle": 8, "in_channels": 3, "channels": [4], "text_width": [768]},
    ],
)
def test_a_config_that_says_nothing_of_a_geometry(config):
    """As damaged files have: what loads them has the error for it."""
    assert geometry_of_config(config) is None


def test_t2i_adapters_fit_too():
    base = based(tiny.unet(tiny.SD15_UNET))
    check_fit(T2IAdapter(channels=[8, 16, 24, 24]), base)
    with refused("adapter", "(8, 16, 24, 32)", expected="channels (8, 16, 24, 24)"):
        check_fit(T2IAdapter(channels=[8, 16, 24, 32]), base)


def test_misshapen_features_are_errors():
    """diffusers drops the middle feature silently where its shape is another."""
    base = based(tiny.unet(tiny.SDXL_UNET))
    right = [
        torch.zeros(2, 8, 4, 4),
        torch.zeros(2, 16, 4, 4),
        torch.zeros(2, 24, 2, 2),
        torch.zeros(2, 24, 2, 2),
    ]
    assert len(match_places(right, base, 2, 8, 8)) == 4
    for wrong in (
        torch.zeros(2, 24, 1, 2),
        torch.zeros(2, 24, 4, 4),
        torch.zeros(1, 24, 2, 2),
        torch.zeros(2, 24, 2),
    ):
        with refused("adapter", tuple(wrong.shape), expected="feature 4 of shape (2, 24, 2, 2)"):
            match_places([*right[:3], wrong], base, 2, 8, 8)
    with refused("adapter", "3", expected="number of features 4"):
        match_places(right[:3], base, 2, 8, 8)


def light(channels):
    """As t2iadapter_color: one channel count fewer than blocks."""
    torch.manual_seed(0)
    return T2IAdapter(
        channels=list(channels),
        num_res_blocks=1,
        adapter_type="light_adapter",
    ).eval()


def test_a_light_t2i_adapter_has_a_feature_for_each_of_its_blocks():
    adapter = light((8, 16, 24))
    features = adapter(tiny.condition())
    assert geometry_of(adapter).channels == tuple(feature.shape[1] for feature in features) == (8, 16, 24, 24)


def test_a_light_t2i_adapter_controls_as_in_diffusers_pipeline():
    adapter, parts = light((8, 16, 24)), tiny.sd15_components(unet=tiny.unet())
    theirs = tiny.quiet(
        StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    )
    settings = {"num_inference_steps": 2, "output_type": "np"}
    expected = theirs("a star", image=tiny.image(), generator=tiny.generators(1), **settings).images
    pipe = tiny.sd15(unet=parts["unet"])
    check_fit(adapter, based(pipe.unet))
    plain = pipe("a star", generator=tiny.generators(1), **settings, height=64, width=64).images
    with attach(pipe, Control(adapter, tiny.image())):
        found = pipe("a star", generator=tiny.generators(1), **settings, height=64, width=64).images
    assert abs(found - expected).max() < 1e-4 < abs(found - plain).max()


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 16), (8, 16, 24, 24)])
def test_a_light_t2i_adapter_of_other_widths_is_refused(channels):
    with refused("adapter"):
        check_fit(light(channels), based(tiny.unet()))
