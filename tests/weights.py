"""Tiny random weights in the layout of the embedded ones."""

from pathlib import Path

import torch
from diffusers import T2IAdapter
from tests import tiny
from tests.conditions import tiny_models

from nexus_adapters import embedded


def write_tiny(root: Path) -> Path:
    """The folders of `embedded.WEIGHTS`, float16, with a base that draws 128x128 pixels."""
    unet = tiny.unet(sample_size=16)
    for condition, method in ((c, method) for c, methods in embedded.METHODS.items() for method in methods):
        folder = root / condition / method
        if method == "t2i":
            channels = list(unet.config.block_out_channels)
            torch.manual_seed(8)
            made = T2IAdapter(channels=channels, num_res_blocks=2, downscale_factor=8)
        else:
            variant, _, skip = method.partition("-")
            made = tiny.adapter(unet, variant=variant, residual=bool(skip))
        made.half().save_pretrained(folder)
    tiny_models.clip(root / "clip")
    tiny.sd15(unet=unet).to(dtype=torch.float16).save_pretrained(root / "base")
    return root
