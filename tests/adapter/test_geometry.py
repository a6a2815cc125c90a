"""An adapter's shapes, from the places of its features. Places in real UNets: tests/bases/test_unet.py."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tests.refusals import refused
from torch import nn

from nexus_adapters.adapter.geometry import base_geometry, geometry_from_places
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.bases.unet import UNetBase

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

# Of every kind: with and without a middle feature, with plain blocks first, in the middle and last.
UNETS = {
    (CROSS, CROSS, CROSS, PLAIN): (1, 2, 4, 8),
    (PLAIN, CROSS, CROSS): (2, 2, 4, 4),
    (CROSS, CROSS, PLAIN): (1, 2, 4, 4),
    (PLAIN, PLAIN, CROSS, PLAIN): (2, 4, 4, 8),
    (CROSS, PLAIN, CROSS, CROSS): (1, 4, 4, 8),
    (CROSS, PLAIN, PLAIN): (1, 4, 4, 4),
    (CROSS, CROSS): (1, 2),
    (CROSS,): (1,),
}


@pytest.mark.parametrize("types", UNETS, ids="-".join)
@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
@torch.no_grad()
def test_every_feature_lands_where_the_unet_adds_it(
    build_unet: Callable[..., UNet2DConditionModel], types: tuple[str, ...], size: tuple[int, int]
) -> None:
    unet = build_unet(*types)
    adapter = NexusAdapter.for_unet(unet, vae_scale_factor=2)
    assert adapter.feature_strides == tuple(2 * stride for stride in UNETS[types])
    unshuffle = adapter.config.unshuffle
    pixels = [-(-2 * side // unshuffle) * unshuffle for side in size]  # padded to the stem's multiple
    text = torch.randn(1, 5, 12)
    features = adapter(torch.rand(1, 3, *pixels), text)
    sample = torch.randn(1, 4, *size)
    base = unet(sample, 1, text).sample
    for place in range(len(features)):
        # Alone in its place, each must fit and change the result; diffusers pops what it has used.
        given = [f if i == place else torch.zeros_like(f) for i, f in enumerate(features)]
        changed = unet(sample, 1, text, down_intrablock_additional_residuals=given).sample
        assert given == []
        assert not torch.equal(changed, base)


def test_stable_diffusion_1(full_unets: dict[str, UNet2DConditionModel]) -> None:
    assert base_geometry(UNetBase(full_unets["sd1"].config), 8) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, True, True, True),
        "unshuffle": 8,
        "text_width": 768,
    }


def test_stable_diffusion_xl(full_unets: dict[str, UNet2DConditionModel]) -> None:
    assert base_geometry(UNetBase(full_unets["sdxl"].config), 8) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, False, True, False),
        "unshuffle": 16,
        "text_width": 2048,
    }


def test_pixels_per_latent_are_those_of_the_bases_autoencoder(
    build_unet: Callable[..., UNet2DConditionModel],
) -> None:
    base = UNetBase(build_unet(PLAIN, CROSS).config, {"block_out_channels": (4, 4, 4)})
    assert base_geometry(base)["unshuffle"] == 2 * 4
    assert base_geometry(base, 3)["unshuffle"] == 2 * 3


def test_real_unet_of_an_unfit_type_is_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet("SimpleCrossAttnDownBlock2D", PLAIN, attention_head_dim=8)
    with refused("unet", "SimpleCrossAttnDownBlock2D as down block 1 of 2"):
        NexusAdapter.for_unet(unet)


def test_three_blocks_without_a_middle_are_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with refused("unet", "mid_block_type=None"):
        NexusAdapter.for_unet(build_unet(CROSS, CROSS, PLAIN, mid_block_type=None))
    assert len(NexusAdapter.for_unet(build_unet(CROSS, PLAIN, mid_block_type=None)).config.channels) == 2


def test_other_classes_are_named(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with refused("unet", "a Linear", expected="UNet2DConditionModel"):
        NexusAdapter.for_unet(nn.Linear(1, 1))
    other = UNet2DModel(
        block_out_channels=(8, 8), down_block_types=(PLAIN, PLAIN), up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with refused("unet", "a UNet2DModel"):
        NexusAdapter.for_unet(other)
    pipeline = nn.Module()
    pipeline.unet = build_unet(CROSS)
    with refused("unet", "a Module", hint=".unet"):
        NexusAdapter.for_unet(pipeline)


def test_compiled_unet_is_seen_through(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet(CROSS, PLAIN)
    compiled = torch.compile(unet, backend="eager")
    assert dict(NexusAdapter.for_unet(compiled).config) == dict(NexusAdapter.for_unet(unet).config)


def test_text_widths(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    assert NexusAdapter.for_unet(build_unet(CROSS, PLAIN, encoder_hid_dim=20)).config.text_width == 20
    with refused("unet", "cross_attention_dim=(12, 16)"):
        NexusAdapter.for_unet(build_unet(CROSS, CROSS, cross_attention_dim=(12, 16)))


def test_geometry_of_any_places() -> None:
    assert geometry_from_places((64, 64, 128), (2, 2, 16), text_width=12, pixels_per_latent=8) == {
        "channels": (64, 64, 128), "pools": (False, False, 3), "unshuffle": 16, "text_width": 12,
    }  # fmt: skip
    transformer = geometry_from_places([1536] * 3, [2] * 3, text_width=4096, pixels_per_latent=8)
    assert transformer["pools"] == (False,) * 3
    adapter = NexusAdapter.for_geometry(
        geometry_from_places((8, 16), (1, 4), text_width=12, pixels_per_latent=4), "slim"
    )
    assert (adapter.variant, adapter.feature_strides) == ("slim", (4, 16))


@pytest.mark.parametrize(
    ("changes", "name", "received"),
    [
        ({"strides": (2, 1)}, "strides", "1 after 2"),
        ({"strides": (1, 3)}, "strides", "3 after 1"),
        ({"strides": (2, 3)}, "strides", "3 after 2"),
        ({"strides": (1,)}, "strides", "[1]"),
        ({"strides": (0, 1)}, "strides", "0"),
        ({"channels": ()}, "channels", "()"),
        ({"text_width": 0}, "text_width", "0"),
        ({"pixels_per_latent": 0}, "pixels_per_latent", "0"),
    ],
)
def test_places_without_a_geometry_are_named(changes: dict[str, object], name: str, received: str) -> None:
    places = {"channels": (8, 16), "strides": (1, 2), "text_width": 12, "pixels_per_latent": 8}
    with refused(name, received):
        geometry_from_places(**{**places, **changes})


def test_a_geometry_is_whole() -> None:
    with refused("geometry", "channels, more", expected="channels, pools, text_width, unshuffle"):
        NexusAdapter.for_geometry({"channels": (8,), "more": 1})
