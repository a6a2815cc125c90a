"""Tiny random weights in place of the models that ship with the package."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from tests import tiny
from tests.conditions import tiny_models

from nexus_adapters import bundled
from nexus_adapters.embedded import pipeline as embedded

EMBEDDED = bundled.BUNDLED["embedded"]
NAMES = [(condition, name) for condition, names in EMBEDDED.adapters.items() for name in names]


def write_tiny(root: Path) -> Path:
    """The folders of `bundled.WEIGHTS`, float16, with a base that draws 128x128 pixels."""
    unet = tiny.unet(sample_size=16)
    for place, (condition, name) in enumerate(NAMES):
        if name == "t2i":
            channels = list(unet.config.block_out_channels)
            torch.manual_seed(8)
            made = T2IAdapter(channels=channels, num_res_blocks=2, downscale_factor=8)
        else:
            made = tiny.adapter(unet, variant=name)
        made.adapter.conv_in.bias.data += place / 100  # so that no two of them are the same
        made.half().save_pretrained(_moved(EMBEDDED.adapters[condition][name], root))
    tiny_models.clip(root / "clip")
    tiny.sd15(unet=unet).to(dtype=torch.float16).save_pretrained(_moved(EMBEDDED.folder, root))
    return root


def use_weights(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let every name of the package mean what lies in `root`."""
    adapters = {
        condition: {name: _moved(folder, root) for name, folder in names.items()}
        for condition, names in EMBEDDED.adapters.items()
    }
    moved = replace(EMBEDDED, folder=_moved(EMBEDDED.folder, root), adapters=adapters)
    patch.setitem(bundled.BUNDLED, EMBEDDED.name, moved)
    patch.setattr(embedded, "WEIGHTS", root)


def _moved(folder: Path, root: Path) -> Path:
    return root / folder.relative_to(bundled.WEIGHTS)
