from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from nexus_adapters.adapter.model import NexusAdapter

TINY = {
    "channels": (8, 16, 16),
    "pools": (False, True, True),
    "unshuffle": 4,
    "text_width": 12,
    "heads": 2,
    "head_width": 4,
}

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        # SDXL's are (1, 2, 10): fewer make the test faster and play no part here.
        "transformer_layers_per_block": 1,
        "use_linear_projection": True,
    },
}


@pytest.fixture
def tiny() -> Callable[..., NexusAdapter]:
    """Builds a seeded adapter of three small stages; any argument can be changed."""

    def build(**changes: Any) -> NexusAdapter:
        torch.manual_seed(0)
        return NexusAdapter(**{**TINY, **changes}).eval()

    return build


@pytest.fixture
def inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Builds a seeded condition and prompt embeddings for `tiny`."""

    def build(
        batch: int = 2, height: int = 32, width: int = 32, in_channels: int = 3
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        return (
            torch.rand(batch, in_channels, height, width, generator=generator),
            torch.randn(batch, 5, 12, generator=generator),
        )

    return build


@pytest.fixture
def build_unet() -> Callable[..., UNet2DConditionModel]:
    """Builds a small real UNet from down-block types; up blocks mirror them."""

    def build(*down_block_types: str, **changes: Any) -> UNet2DConditionModel:
        torch.manual_seed(0)
        widths = (16, 32, 48, 48)[: len(down_block_types)]
        arguments = {
            "sample_size": 16,
            "down_block_types": down_block_types,
            "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down_block_types)),
            "block_out_channels": widths,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
        }
        return UNet2DConditionModel(**{**arguments, **changes}).eval()

    return build


@pytest.fixture(scope="session")
def full_unets() -> dict[str, UNet2DConditionModel]:
    """UNets of the real dimensions, without memory (on the meta device)."""
    with torch.device("meta"):
        return {name: UNet2DConditionModel(**config) for name, config in UNETS.items()}
