"""What can be trained: a module, and how a batch becomes the UNet's arguments through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diffusers.models.adapter import T2IAdapter
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus_adapters.adapter.geometry import adapter_geometry, unet_config
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.data.batch import Batch
from nexus_adapters.injection.residuals import residuals

# diffusers' adapter types, and before which of their stages they pool.
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

    def unet_arguments(
        self,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        prompt_embeds: Float[Tensor, "b n d"],
    ) -> dict[str, Any]:
        """As in generation. Dropped conditions' features are zero: the module always runs, as DDP needs."""
        inputs = (batch.condition, prompt_embeds) if self.reads_text else (batch.condition,)
        features = self.module(*inputs)
        return residuals(features, scale=batch.has_condition.to(noisy.dtype), like=noisy)


def build_adapter(
    method: str,
    unet: nn.Module | Any,
    vae_scale_factor: int = 8,
    residual: bool = False,
    zero_init: bool = False,
) -> Any:
    """The untrained `NexusAdapter` or `T2IAdapter` of a method, of the shapes that fit the UNet.

    `method`: "prime", "slim" or "t2i". `vae_scale_factor`: image pixels per latent pixel, a side.

    Raises ValueError for a UNet that takes no features, and where diffusers has no T2I-Adapter of its shape.
    """
    geometry = adapter_geometry(unet_config(unet), vae_scale_factor)
    if method != "t2i":
        return NexusAdapter.for_unet(
            unet, method, vae_scale_factor=vae_scale_factor, residual=residual, zero_init=zero_init
        )
    kinds = {pools: name for name, pools in _T2I_POOLS.items()}
    if geometry["pools"] not in kinds:
        raise ValueError(
            f"adapter.method: expected a UNet that pools as {' or '.join(map(str, kinds))}, for which "
            f"diffusers has T2I-Adapters; received one that pools as {geometry['pools']}"
        )
    return T2IAdapter(
        in_channels=3,
        channels=list(geometry["channels"]),
        num_res_blocks=2,
        downscale_factor=geometry["unshuffle"],
        adapter_type=kinds[geometry["pools"]],
    )
