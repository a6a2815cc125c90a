"""ControlNet (arXiv 2302.05543), in diffusers' class: a copy of the UNet's first half, run in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.tensors import tensor_names
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.unet import check_kind
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.methods.cost import Cost, counted_gmacs, example, parameter_count, skeleton
from nexus_adapters.methods.method import (
    AdapterOptions,
    Generate,
    GenerationSettings,
    Method,
    card_call,
    other_pipeline,
)
from nexus_adapters.methods.registry import register_method

_CONDITION_CHANNELS = (16, 32, 96, 256)  # of the condition encoder, diffusers' default


@dataclass(frozen=True)
class ControlNetOptions(AdapterOptions):
    """The `[adapter]` section for a ControlNet."""


class ControlNetMethod(Method):
    """diffusers' `ControlNetModel`."""

    label = "ControlNet"
    Options = ControlNetOptions
    keeps_float32 = True
    classes = (ControlNetModel,)

    def build(self, base: Base, denoiser: nn.Module | Any, options: ControlNetOptions) -> nn.Module:
        """Build a ControlNet as a copy of the UNet's first half, in float32."""
        check_is_unet(self.name, denoiser)
        channels = condition_channels(self.name, base.pixels_per_latent)
        kind: Any = ControlNetModel
        built: nn.Module = kind.from_unet(denoiser, conditioning_embedding_out_channels=channels)
        return nn.Module.to(built, torch.float32).requires_grad_(True)

    def recognizes(self, saved: Saved) -> bool:
        """Recognize diffusers' folders, single files, and a run's checkpoints."""
        if saved.run or saved.class_name:
            return super().recognizes(saved)
        starts = ("controlnet_cond_embedding.", "control_model.", "input_hint_block.")
        return any(name.startswith(starts) for name in tensor_names(saved))

    def load(self, saved: Saved) -> nn.Module:
        """Load a `ControlNetModel`, also from a single file as first published."""
        if saved.run or saved.config:
            return super().load(saved)
        kind: Any = ControlNetModel
        try:
            single: nn.Module = kind.from_single_file(str(saved.files[0]))
        except Exception as error:  # diffusers downloads the config, and the Hub's client raises many kinds
            reason = one_line(error)
            raise InvalidArgument(
                "adapter", "a ControlNet that diffusers can read", f"'{saved.source}' ({reason})"
            ) from error
        return single.eval()

    def check_fit(self, module: Any, base: Base) -> None:
        """Check the channels and the text width of the UNet that it was copied from."""
        check_unet_widths(module.config, module.config["in_channels"], "block_out_channels", base)

    def check_saved(self, saved: Saved, base: Base) -> None:
        """Check the same as `check_fit`, as far as the config states it."""
        if {"in_channels", "cross_attention_dim", "block_out_channels"} <= set(saved.config):
            check_unet_widths(saved.config, saved.config["in_channels"], "block_out_channels", base)

    def denoiser_arguments(
        self,
        module: nn.Module | Any,
        batch: Batch,
        noisy: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        base: Base,
    ) -> dict[str, Any]:
        """Return the ControlNet's residuals, as in diffusers' pipelines; zeros for dropped conditions."""
        down, middle = module(
            noisy,
            t,
            encoder_hidden_states=batch.prompt_embeds,
            controlnet_cond=batch.condition,
            return_dict=False,
            **base.added_arguments(batch.added),
        )
        scale = batch.has_condition.to(noisy.dtype)[:, None, None, None]
        return {
            "down_block_additional_residuals": [(scale * part).to(noisy.dtype) for part in down],
            "mid_block_additional_residual": (scale * middle).to(noisy.dtype),
        }

    @contextmanager
    def generating(
        self, pipe: Any, module: nn.Module, conditions: Sequence[Image.Image], settings: GenerationSettings
    ) -> Iterator[Generate]:
        """Generate with diffusers' own pipeline."""
        from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

        refuse_prompts(self, settings)
        is_xl = hasattr(pipe, "text_encoder_2")
        kind = StableDiffusionXLControlNetPipeline if is_xl else StableDiffusionControlNetPipeline
        controlled = other_pipeline(kind, pipe, controlnet=module)

        def generate(*args: Any, **arguments: Any) -> Any:
            given = {"image": list(conditions), "controlnet_conditioning_scale": settings.scale}
            return controlled(*args, **arguments, **given)

        yield generate

    def cost(self, module: nn.Module, base: Base, size: int, steps: int) -> Cost:
        """Count the cost, which is per step."""
        s, copy = example(base, size), skeleton(module)
        gmacs = counted_gmacs(lambda: copy(s.latents, s.timestep, s.text, s.condition, **s.added))
        return Cost(parameter_count(module), gmacs_per_step=gmacs)

    def card(self, module: nn.Module, base: str, source: str) -> str:
        """Return code for the model card, which uses diffusers' own pipelines."""
        return "\n".join(
            [
                "from diffusers import AutoPipelineForText2Image, ControlNetModel",
                "from nexus_adapters import load_base",
                "",
                f'controlnet = ControlNetModel.from_pretrained("{source}")',
                f'pipe = AutoPipelineForText2Image.from_pipe(load_base("{base}"), controlnet=controlnet)',
                "# condition: a PIL image of the structure map",
                card_call(base, ", image=condition"),
            ]
        )


def check_is_unet(name: str, denoiser: nn.Module) -> None:
    """Raise `InvalidArgument` named "base" for a denoiser that is not a UNet."""
    is_unet = isinstance(denoiser, UNet2DConditionModel)
    expect(is_unet, "base", f"a base with a UNet, for method {name}", f"a {type(denoiser).__name__}")


def condition_channels(name: str, pixels_per_latent: int) -> tuple[int, ...]:
    """Return the condition encoder's channels: it halves a condition as often as the VAE the image."""
    halvings = pixels_per_latent.bit_length() - 1
    fits = pixels_per_latent == 2**halvings and 1 <= halvings < len(_CONDITION_CHANNELS)
    expect(
        fits,
        "base",
        f"a VAE that shrinks by 2, 4 or 8, for method {name}",
        f"a VAE that shrinks by {pixels_per_latent}",
    )
    return _CONDITION_CHANNELS[-1 - halvings :]


def check_unet_widths(config: Any, in_channels: int, widths: str, base: Base) -> None:
    """Raise `InvalidArgument` named "adapter" unless its channels and text width match the UNet."""
    text_widths = config["cross_attention_dim"], base.config.get("cross_attention_dim")
    check_kind(base, text_widths=text_widths)
    for key, found in (
        ("in_channels", in_channels),
        ("cross_attention_dim", config["cross_attention_dim"]),
        ("block_out_channels", config[widths]),
    ):
        needed = base.config.get(key)
        if _as_tuple(found) != _as_tuple(needed):
            raise InvalidArgument("adapter", f"{key} {needed}, to fit the base", found)


def refuse_prompts(method: Method, settings: GenerationSettings) -> None:
    """Raise `InvalidArgument` for separate prompts with a method that reads the base's own embeddings."""
    if settings.adapter_prompts is not None:
        raise InvalidArgument("adapter_prompts", f"None for a {method.label}", len(settings.adapter_prompts))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


register_method(ControlNetMethod("controlnet"))
