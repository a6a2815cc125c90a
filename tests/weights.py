"""Tiny random weights in place of those of the distribution nexus-adapters-embedded."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import T2IAdapter
from tests import tiny
from tests.conditions import tiny_models

from nexus_adapters.bundled import BUNDLED

EMBEDDED = BUNDLED["embedded"]
NAMES = [(condition, name) for condition, names in EMBEDDED.adapters.items() for name in names]


def write_tiny(root: Path) -> Path:
    """The subfolders of `weights_folder()`, float16, with a base that generates 128x128 pixels."""
    unet = tiny.unet(sample_size=16)
    for place, (condition, name) in enumerate(NAMES):
        if name == "t2i":
            channels = list(unet.config.block_out_channels)
            torch.manual_seed(8)
            made = T2IAdapter(channels=channels, num_res_blocks=2, downscale_factor=8)
        else:
            made = tiny.adapter(unet, variant=name)
        made.adapter.conv_in.bias.data += place / 100  # so that no two of them are the same
        made.half().save_pretrained(root / EMBEDDED.adapters[condition][name])
    tiny_models.clip(root / "clip")
    tiny.sd15(unet=unet).to(dtype=torch.float16).save_pretrained(root / EMBEDDED.subfolder)
    return root


def use_weights(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let the names of the embedded models mean the folders in `root`, as if they were installed."""
    patch.setitem(sys.modules, "nexus_adapters_embedded", SimpleNamespace(WEIGHTS=root))


def hide_weights(patch: pytest.MonkeyPatch) -> None:
    """Let imports fail as they do where nexus-adapters-embedded is not installed."""
    patch.setitem(sys.modules, "nexus_adapters_embedded", None)
