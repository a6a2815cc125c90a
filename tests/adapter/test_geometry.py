"""The places of the features, against real diffusers UNets."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from nexus_adapters.adapter.geometry import adapter_geometry, latent_strides, text_width
from nexus_adapters.adapter.model import NexusAdapter

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
    assert adapter_geometry(full_unets["sd1"].config) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, True, True, True),
        "unshuffle": 8,
        "text_width": 768,
    }


def test_stable_diffusion_xl(full_unets: dict[str, UNet2DConditionModel]) -> None:
    assert adapter_geometry(full_unets["sdxl"].config) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, False, True, False),
        "unshuffle": 16,
        "text_width": 2048,
    }


@pytest.mark.parametrize(
    "name",
    ["SimpleCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
)
def test_block_types_without_features_are_named(name: str) -> None:
    config = {"down_block_types": (PLAIN, name, CROSS), "mid_block_type": "UNetMidBlock2D"}
    with pytest.raises(
        ValueError, match=rf"^unet: expected .*{CROSS}.*; received {name} as down block 2 of 3"
    ):
        latent_strides(config)


def test_real_unet_of_an_unfit_type_is_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet("SimpleCrossAttnDownBlock2D", PLAIN, attention_head_dim=8)
    with pytest.raises(ValueError, match="SimpleCrossAttnDownBlock2D as down block 1 of 2"):
        NexusAdapter.for_unet(unet)


def test_three_blocks_without_a_middle_are_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with pytest.raises(ValueError, match="mid_block_type=None"):
        NexusAdapter.for_unet(build_unet(CROSS, CROSS, PLAIN, mid_block_type=None))
    assert len(NexusAdapter.for_unet(build_unet(CROSS, PLAIN, mid_block_type=None)).config.channels) == 2


def test_other_classes_are_named(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with pytest.raises(ValueError, match=r"^unet: expected a UNet2DConditionModel; received a Linear"):
        NexusAdapter.for_unet(nn.Linear(1, 1))
    other = UNet2DModel(
        block_out_channels=(8, 8), down_block_types=(PLAIN, PLAIN), up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="received a UNet2DModel"):
        NexusAdapter.for_unet(other)
    pipeline = nn.Module()
    pipeline.unet = build_unet(CROSS)
    with pytest.raises(ValueError, match=r"received a Module \(pass its \.unet\)"):
        NexusAdapter.for_unet(pipeline)


def test_compiled_unet_is_seen_through(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet(CROSS, PLAIN)
    compiled = torch.compile(unet, backend="eager")
    assert dict(NexusAdapter.for_unet(compiled).config) == dict(NexusAdapter.for_unet(unet).config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cross_attention_dim": 768}, 768),
        ({"cross_attention_dim": [640, 640]}, 640),
        ({"cross_attention_dim": 2048, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, 4096),
        (
            {"cross_attention_dim": 768, "encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_image_proj"},
            1024,
        ),
        ({"cross_attention_dim": 768, "encoder_hid_dim_type": "ip_image_proj"}, 768),
        (
            {"cross_attention_dim": 2048, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "ip_image_proj"},
            4096,
        ),
    ],
)
def test_text_width(config: dict[str, object], expected: int) -> None:
    assert text_width({"encoder_hid_dim": None, "encoder_hid_dim_type": None, **config}) == expected


def test_text_width_of_a_real_text_projection(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet(CROSS, PLAIN, encoder_hid_dim=20)
    assert NexusAdapter.for_unet(unet).config.text_width == 20
    assert unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 20)).sample.shape == (1, 4, 8, 8)


def test_texts_of_several_widths_or_none_are_refused() -> None:
    config = SimpleNamespace(encoder_hid_dim=None, encoder_hid_dim_type=None, cross_attention_dim=[768, 1024])
    with pytest.raises(ValueError, match=r"cross_attention_dim=\(768, 1024\)"):
        text_width(vars(config))
    with pytest.raises(ValueError, match="encoder_hid_dim_type='image_proj'"):
        text_width(
            {"encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj", "cross_attention_dim": 768}
        )
