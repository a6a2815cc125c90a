"""One control's features for one call of the denoiser."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.bases.base import Base
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.injection.condition import fit_condition
from nexus_adapters.injection.control import Control
from nexus_adapters.injection.fit import match_places, pixels_per_latent, traits
from nexus_adapters.injection.mask import mask_levels
from nexus_adapters.injection.rows import RowPlan


def compute_features(
    control: Control,
    plan: RowPlan,
    base: Base,
    latents: Tensor,
    latent_size: tuple[int, int],
    prompt_embeds: Float[Tensor, "rows n d"],
) -> list[Tensor]:
    """Run the adapter: one (plan.count, C, H, W) per place in the base, with the latents' device and dtype.

    Weighted by the control's mask and level scales, since these are the same in all steps.

    The adapter computes where it lies and in its own dtype, which under layerwise casting is not that of its
    weights. Offloaded weights lie on `meta` until their module is called: then its inputs go to the latents'
    device.
    """
    wanted = traits(control.adapter)
    adapter: Any = control.adapter
    weight = next(adapter.parameters())
    device = latents.device if weight.is_meta else weight.device
    height, width = latent_size
    factor = pixels_per_latent(control.adapter, base)
    size = height * factor, width * factor
    condition = fit_condition(_cropped(control.condition, control), *size, wanted.unshuffle)
    condition = _laid_out(condition.to(device, adapter.dtype), plan)
    if wanted.text_width is None:
        features = control.adapter(condition)
    else:
        if prompt_embeds.shape[-1] != wanted.text_width:
            raise InvalidArgument(
                base.text_argument,
                f"width {wanted.text_width}, as the adapter reads it",
                prompt_embeds.shape[-1],
            )
        text = prompt_embeds[plan.first : plan.first + plan.count].to(device, adapter.dtype)
        features = control.adapter(condition, text)
    features = _weighted(features, control, plan, size, wanted.unshuffle)
    matched = match_places(features, base, plan.count, height, width)
    return [feature.to(latents.device, latents.dtype) for feature in matched]


def _weighted(
    features: Sequence[Tensor], control: Control, plan: RowPlan, size: tuple[int, int], unshuffle: int
) -> list[Tensor]:
    weighted = list(features)
    if control.level_scales is not None:
        weighted = [f * factor for f, factor in zip(weighted, control.level_scales, strict=True)]
    if control.mask is not None:
        mask = control.mask
        if len(mask) not in (1, len(control.condition)):
            raise InvalidArgument(
                "mask", f"1 mask, or {len(control.condition)}, as many as conditions", len(mask)
            )
        mask = fit_condition(_cropped(mask, control), *size, unshuffle, name="mask")
        mask = mask.to(features[0].device).expand(len(control.condition), -1, -1, -1)
        levels = mask_levels(_laid_out(mask, plan), features, unshuffle)
        weighted = [f * level.to(f.dtype) for f, level in zip(weighted, levels, strict=True)]
    return weighted


def _laid_out(maps: Float[Tensor, "k c h w"], plan: RowPlan) -> Float[Tensor, "n c h w"]:
    """One map for each row that the adapter runs on."""
    return maps.repeat_interleave(plan.repeat, dim=0).repeat(plan.tile, 1, 1, 1)


def _cropped(maps: Float[Tensor, "k c h w"], control: Control) -> Float[Tensor, "k c h_crop w_crop"]:
    """The part of a condition, or of its mask, that the control's crop leaves."""
    if control.crop is None:
        return maps
    left, top, right, bottom = control.crop
    height, width = control.condition.shape[2:]
    if right > width or bottom > height:
        raise InvalidArgument(
            "crop",
            f"a part of the condition, which has {width}x{height} pixels",
            f"left {left}, top {top}, right {right}, bottom {bottom}",
        )
    if maps.shape[2:] != (height, width):  # a mask of another resolution
        maps = fit_condition(maps, height, width, multiple=1, name="mask")
    return maps[:, :, top:bottom, left:right]


def check_call(base: Base, latents: object, prompt_embeds: object) -> tuple[Tensor, Tensor]:
    """Both; `InvalidArgument` unless they are latents and as many rows of prompt embeddings."""
    if not isinstance(latents, Tensor) or latents.ndim < 3:
        raise InvalidArgument(base.latents_argument, "latents", _shape(latents))
    text, rows = prompt_embeds, len(latents)
    if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != rows:
        raise InvalidArgument(
            base.text_argument,
            f"prompt embeddings ({rows}, N, D), a row for each of the latents",
            _shape(text),
        )
    return latents, text


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
