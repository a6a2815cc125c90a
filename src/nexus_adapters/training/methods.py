"""What can be trained: a module, and how a batch becomes the UNet's arguments through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus_adapters.adapter.geometry import adapter_geometry, unet_config
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.residuals import residuals
from nexus_adapters.injection.schedule import noise_factors
from nexus_adapters.training.config import AdapterOptions
from nexus_adapters.training.controlnet_xs import build_controlnet_xs, fuse

# diffusers' adapter types, and before which of their stages they pool.
_CONDITION_CHANNELS = (16, 32, 96, 256)  # of ControlNet's encoder of conditions, diffusers' default
_T2I_POOLS = {"full_adapter": (False, True, True, True), "full_adapter_xl": (False, False, True, False)}


@runtime_checkable
class Method(Protocol):
    """A way to control a frozen UNet. `module` is what is trained, wrapped (DDP, compiled) or not."""

    module: nn.Module

    def unet_arguments(
        self,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
    ) -> dict[str, Any]:
        """The arguments that let the UNet follow the batch's condition."""


@dataclass
class FeatureMethod:
    """Adapters whose features are added to the UNet's down blocks: Nexus, which reads the text, and T2I."""

    module: nn.Module
    reads_text: bool
    reads_instead: Float[Tensor, "1 n d"] | None = None
    """Embeddings that a text-reading adapter gets in place of every prompt's."""
    noise_exponent: float = 0.0
    """As `NexusAdapter`'s; needs `scheduler`."""
    scheduler: Any = None
    """The noise schedule."""

    def unet_arguments(
        self,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
    ) -> dict[str, Any]:
        """As in generation. Dropped conditions' features are zero: the module always runs, as DDP needs."""
        if self.reads_instead is not None:
            prompt_embeds = self.reads_instead.expand(len(prompt_embeds), -1, -1)
        inputs = (batch.condition, prompt_embeds) if self.reads_text else (batch.condition,)
        features = self.module(*inputs)
        scale = batch.has_condition.to(noisy.dtype)
        if self.noise_exponent:
            scale = scale * noise_factors(self.scheduler, timesteps, self.noise_exponent).to(noisy.dtype)
        return residuals(features, scale=scale, like=noisy)


@dataclass
class ControlNetXSMethod:
    """ControlNet-XS, whose `module` is the fused network: it is called in place of the UNet."""

    module: nn.Module

    def unet_arguments(
        self,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
    ) -> dict[str, Any]:
        """What the fused network takes beside the UNet's own. Dropped conditions have scale zero."""
        return {
            "controlnet_cond": batch.condition.to(noisy.dtype),
            "conditioning_scale": batch.has_condition.to(noisy.dtype)[:, None, None, None],
        }


@dataclass
class ControlNetMethod:
    """diffusers' ControlNet: reads noisy latents, time, text and condition, and runs in every step."""

    module: nn.Module

    def unet_arguments(
        self,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
    ) -> dict[str, Any]:
        """As in its pipelines. Dropped conditions' residuals are zero."""
        down, middle = self.module(
            noisy,
            timesteps,
            encoder_hidden_states=prompt_embeds,
            controlnet_cond=batch.condition,
            return_dict=False,
            **batch.unet_arguments,
        )
        scale = batch.has_condition.to(noisy.dtype)[:, None, None, None]
        return {
            "down_block_additional_residuals": [(scale * part).to(noisy.dtype) for part in down],
            "mid_block_additional_residual": (scale * middle).to(noisy.dtype),
        }


def method_of(
    adapter: nn.Module | Any,
    module: nn.Module | None = None,
    scheduler: Any = None,
) -> Method:
    """How a UNet is controlled by an adapter; `module` is the same one wrapped, where it is.

    `scheduler` tells the noise, with which the features of an adapter with a `noise_exponent` fade.
    """
    called = adapter if module is None else module
    if isinstance(adapter, ControlNetXSAdapter):
        return ControlNetXSMethod(called)
    if isinstance(adapter, ControlNetModel):
        return ControlNetMethod(called)
    config: Any = adapter.config
    exponent = config.get("noise_exponent", 0.0)
    return FeatureMethod(
        called, isinstance(adapter, NexusAdapter), noise_exponent=exponent, scheduler=scheduler
    )


def trained_module(adapter: nn.Module | Any, unet: nn.Module | Any) -> nn.Module:
    """What computes in a step: the adapter, or where it only works in one network with the base, that."""
    fused: nn.Module = fuse(unet, adapter) if isinstance(adapter, ControlNetXSAdapter) else adapter
    return fused


def called_unet(method: Method, unet: nn.Module) -> nn.Module:
    """What is called as the UNet: the base's, or the network that it is fused into."""
    return method.module if isinstance(method, ControlNetXSMethod) else unet


def adapter_of(options: AdapterOptions, unet: nn.Module | Any, vae_scale_factor: int) -> Any:
    """The untrained adapter of a recipe. ValueError as `build_adapter`."""
    return build_adapter(
        options.method,
        unet,
        vae_scale_factor,
        options.residual,
        options.zero_init,
        options.size_ratio,
        {name: getattr(options, name) for name in ("groups", "heads", "head_width", "noise_exponent")},
    )


def build_adapter(
    method: str,
    unet: nn.Module | Any,
    vae_scale_factor: int = 8,
    residual: bool = False,
    zero_init: bool = False,
    size_ratio: float = 0.125,
    shape: Mapping[str, float] | None = None,
) -> Any:
    """The untrained adapter of a method, of the UNet's shapes: a `NexusAdapter`, or a class of diffusers.

    `method`: "prime", "slim", "t2i", "controlnet", which starts as a copy of the UNet's first half, or
    "controlnet-xs", whose channels are the UNet's times `size_ratio`.
    `vae_scale_factor`: image pixels per latent pixel, a side. `shape`: arguments of a
    `NexusAdapter` in place of those that the UNet gives; 0 leaves one out. A T2I-Adapter takes
    `noise_exponent` of them into its config.

    Raises ValueError for a UNet that takes no features, and where diffusers has no T2I-Adapter of its shape.
    """
    if method == "controlnet":
        return _build_controlnet(unet, vae_scale_factor)
    if method == "controlnet-xs":
        return build_controlnet_xs(unet, size_ratio, _condition_channels(method, vae_scale_factor))
    geometry = adapter_geometry(unet_config(unet), vae_scale_factor)
    if method != "t2i":
        given = {name: value for name, value in (shape or {}).items() if value}
        return NexusAdapter.for_unet(
            unet, method, vae_scale_factor=vae_scale_factor, residual=residual, zero_init=zero_init, **given
        )
    kinds = {pools: name for name, pools in _T2I_POOLS.items()}
    if geometry["pools"] not in kinds:
        raise ValueError(
            f"adapter.method: expected a UNet that pools as {' or '.join(map(str, kinds))}, for which "
            f"diffusers has T2I-Adapters; received one that pools as {geometry['pools']}"
        )
    t2i: Any = T2IAdapter(
        in_channels=3,
        channels=list(geometry["channels"]),
        num_res_blocks=2,
        downscale_factor=geometry["unshuffle"],
        adapter_type=kinds[geometry["pools"]],
    )
    exponent = (shape or {}).get("noise_exponent")
    if exponent:  # diffusers keeps what it does not know, and `Control` reads it
        t2i.register_to_config(noise_exponent=exponent)
    return t2i


def _build_controlnet(unet: Any, vae_scale_factor: int) -> ControlNetModel:
    """Zhang et al. 2023."""
    channels = _condition_channels("controlnet", vae_scale_factor)
    built: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    controlnet: ControlNetModel = nn.Module.to(built, torch.float32).requires_grad_(True)
    return controlnet


def _condition_channels(method: str, vae_scale_factor: int) -> tuple[int, ...]:
    """Of the encoder of conditions, which halves a condition as often as the VAE does the image."""
    halvings = vae_scale_factor.bit_length() - 1
    if vae_scale_factor != 2**halvings or not 1 <= halvings < len(_CONDITION_CHANNELS):
        raise ValueError(
            f"adapter.method: expected a VAE that shrinks by 2, 4 or 8, for {method}; received one that "
            f"shrinks by {vae_scale_factor}"
        )
    return _CONDITION_CHANNELS[-1 - halvings :]
