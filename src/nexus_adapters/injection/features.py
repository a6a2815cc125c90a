"""One control's features for one call of the UNet."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.injection.condition import fit_condition
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.fit import match_places, pixels_per_latent, traits
from nexus_adapters.injection.rows import RowPlan


def compute_features(
    control: Control,
    plan: RowPlan,
    unet: nn.Module,
    latents: Float[Tensor, "rows c h w"],
    prompt_embeds: Float[Tensor, "rows n d"],
) -> list[Tensor]:
    """Run the adapter: one (plan.count, C, H, W) per place in the UNet, with the latents' device and dtype.

    The adapter computes where it lies and in its own dtype, which under layerwise casting is not that of its
    weights. Offloaded weights lie on `meta` until their module is called: then its inputs go to the latents'
    device.
    """
    wanted = traits(control.adapter)
    adapter: Any = control.adapter
    weight = next(adapter.parameters())
    device = latents.device if weight.is_meta else weight.device
    height, width = latents.shape[2:]
    factor = pixels_per_latent(control.adapter, unet)
    condition = fit_condition(control.condition, height * factor, width * factor, wanted.unshuffle)
    condition = (
        condition.to(device, adapter.dtype).repeat_interleave(plan.repeat, dim=0).repeat(plan.tile, 1, 1, 1)
    )
    if wanted.text_width is None:
        features = control.adapter(condition)
    else:
        if prompt_embeds.shape[-1] != wanted.text_width:
            raise ValueError(
                f"encoder_hidden_states: expected width {wanted.text_width}, as the adapter reads it; "
                f"received {prompt_embeds.shape[-1]}"
            )
        text = prompt_embeds[plan.first : plan.first + plan.count].to(device, adapter.dtype)
        features = control.adapter(condition, text)
    matched = match_places(features, unet, plan.count, height, width)
    return [feature.to(latents.device, latents.dtype) for feature in matched]


def check_call(latents: object, prompt_embeds: object) -> tuple[Tensor, Tensor]:
    """Both, if they are a UNet's `sample` and `encoder_hidden_states` of as many rows; else a ValueError."""
    if not isinstance(latents, Tensor) or latents.ndim != 4:
        raise ValueError(f"sample: expected latents (B, C, H, W); received {_shape(latents)}")
    text, rows = prompt_embeds, len(latents)
    if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != rows:
        raise ValueError(
            f"encoder_hidden_states: expected prompt embeddings ({rows}, N, D), a row for each of the "
            f"latents; received {_shape(text)}"
        )
    return latents, text


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
