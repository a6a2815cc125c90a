"""Untrained adapters of every method, for tiny bases."""

from typing import Any

import torch
from tests import tiny

from nexus_adapters.methods import find_method


def build(name: str, unet: Any = None, vae_levels: int = 4, **options: Any) -> Any:
    """The adapter that a recipe with `adapter.method = name` trains for a UNet, from the current seed."""
    with torch.random.fork_rng():  # it is seeded
        unet = unet or tiny.unet()
    method = find_method(name)
    return method.build(tiny.base(unet, vae_levels=vae_levels), unet, method.Options(method=name, **options))
