"""What a control costs, counted on shapes alone."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tests import tiny

from nexus_adapters.bases.families import base_of
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.methods import Cost, find_method

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd15": {"cross_attention_dim": 768, "attention_head_dim": 8}, "sdxl": SDXL}


def cost_of(name, base, denoiser, size, steps, **options):
    method = find_method(name)
    adapter = method.build(base, denoiser, method.Options(name, **options))
    return method.cost(adapter, base, size, steps)


@pytest.fixture(scope="module", params=UNETS)
def full_size(request):
    """(name, base, UNet) of a stock base at its true size, without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[request.param])
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    return request.param, UNetBase(unet.config, vae.config), unet


# Weights, and for SD 1.x billions of multiply-accumulates of the adapter at 512 pixels.
PINNED = {
    ("sd15", "t2i"): (77_369_280, 29.95),
    ("sd15", "prime"): (85_817_600, 33.83),
    ("sd15", "prime-paper"): (85_817_600, 33.83),
    ("sd15", "slim"): (59_288_960, 24.29),
    ("sd15", "slim-paper"): (59_288_960, 24.29),
    ("sdxl", "t2i"): (79_028_160, None),
    ("sdxl", "prime"): (94_030_080, None),
    ("sdxl", "prime-paper"): (94_030_080, None),
    ("sdxl", "slim"): (67_501_440, None),
    ("sdxl", "slim-paper"): (67_501_440, None),
}


@pytest.mark.parametrize("method", ["t2i", "prime", "prime-paper", "slim", "slim-paper"])
def test_weights_and_multiplications_at_true_size(full_size, method):
    kind, base, unet = full_size
    parameters, gmacs = PINNED[kind, method]
    with torch.device("meta"):
        found = cost_of(method, base, unet, 512, steps=20)
    assert found.parameters == parameters
    assert found.gmacs_per_step == 0
    assert found.gmacs(1) == found.gmacs(20) == found.gmacs_once > 0
    if gmacs is not None:
        assert found.gmacs_once == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize("full_size", ["sd15", pytest.param("sdxl", marks=pytest.mark.full)], indirect=True)
def test_a_controlnet_runs_in_every_step(full_size):
    kind, base, unet = full_size
    with torch.device("meta"):
        found = cost_of("controlnet", base, unet, 512, steps=20)
    assert found.gmacs_once == 0
    assert found.gmacs(20) == 20 * found.gmacs_per_step > 0
    if kind == "sd15":
        assert found.parameters == 361_279_120
    else:
        assert round(found.parameters / 1e6) == 1251


def test_gmacs_are_of_a_whole_image():
    assert Cost(1, gmacs_once=3.0, gmacs_per_step=0.5).gmacs(4) == 5.0


METHODS = ("prime", "slim-paper", "t2i", "controlnet", "controlnet-xs")
SHORT = [("prime", False), ("t2i", True), ("controlnet-xs", True)]


@pytest.mark.parametrize(
    ("method", "is_sdxl"),
    [
        *SHORT,
        *(
            pytest.param(method, is_sdxl, marks=pytest.mark.full)
            for method in METHODS
            for is_sdxl in (False, True)
            if (method, is_sdxl) not in SHORT
        ),
    ],
)
def test_what_a_control_costs_is_counted_for_every_base(method, is_sdxl):
    base, unet = base_of(tiny.sdxl() if is_sdxl else tiny.sd15())
    options = {"size_ratio": 1.0} if method == "controlnet-xs" else {}
    found = cost_of(method, base, unet, 128, steps=10, **options)
    assert found.gmacs(1) > 0
    assert found.gmacs(10) == pytest.approx(found.gmacs(1) * (10 if "controlnet" in method else 1))
