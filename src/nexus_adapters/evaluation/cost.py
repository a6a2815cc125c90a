"""What a control costs in drawing one picture: multiplications, counted and not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nexus_adapters.adapter.geometry import text_width
from nexus_adapters.training.base import BaseShape
from nexus_adapters.training.controlnet_xs import fuse
from nexus_adapters.training.dry_run import added_arguments

_TOKENS = 77


def control_gmacs(adapter: nn.Module | Any, shape: BaseShape, resolution: int, steps: int) -> float:
    """Billions of multiply-accumulates that a control adds to one square picture, without guidance.

    A T2I-Adapter and a Nexus adapter run once a picture; ControlNet and ControlNet-XS in every step, and
    with guidance twice in each. Counted by torch on shapes alone, so the adapter's weights do not matter.

    Args:
        adapter: of any kind that is evaluated; None adds nothing.
        shape: of its base.
        resolution: side of the picture in pixels.
        steps: of the sampler.
    """
    if adapter is None:
        return 0.0
    unet = shape.empty_unet()
    side = resolution // shape.vae_scale_factor
    with torch.device("meta"):
        condition = torch.empty(1, 3, resolution, resolution)
        text = torch.empty(1, _TOKENS, text_width(shape.unet))
        latents, time = torch.empty(1, shape.latent_channels, side, side), torch.zeros(1)
        added = added_arguments(shape, 1, torch.float32)
        kind: Any = type(adapter)
        copy = kind.from_config(adapter.config)
        if isinstance(adapter, T2IAdapter):
            return _gmacs(copy, condition)
        if isinstance(adapter, ControlNetModel):
            return steps * _gmacs(copy, latents, time, text, condition, **added)
        if isinstance(adapter, ControlNetXSAdapter):
            both = _gmacs(fuse(unet, copy), latents, time, text, condition, **added)
            return steps * (both - _gmacs(unet, latents, time, text, **added))
        return _gmacs(copy, condition, text)


def _gmacs(module: nn.Module, *inputs: Any, **arguments: Any) -> float:
    with torch.no_grad():
        return counted_gmacs(lambda: module(*inputs, **arguments))


def counted_gmacs(run: Callable[[], object]) -> float:
    """Billions of multiply-accumulates that torch counts in what `run` does."""
    # Of attention torch counts the plain kind on all devices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops()) / 2e9
