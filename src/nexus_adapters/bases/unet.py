"""Stable Diffusion 1.x, 2.x, XL and everything else that denoises with a `UNet2DConditionModel`.

Where diffusers (0.42, `UNet2DConditionModel.forward`) adds `down_intrablock_additional_residuals`, in order:

- `CrossAttnDownBlock2D` takes one feature and adds it after its last attention, before its downsampler: at
  the stride of the block's input, and also to the skip connection.
- `DownBlock2D` runs first, and the feature is added to its output, after its downsampler: at twice the stride
  of the block's input. The last down block has no downsampler.
- A remaining feature is added after the middle block if it has the sample's shape; otherwise it is silently
  dropped. A ControlNet's residuals are a separate argument.

`SimpleCrossAttnDownBlock2D` and `KCrossAttnDownBlock2D` are passed the feature but do not accept it; for any
other type the stride is not known here. All of these are errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from jaxtyping import Float, Int
from torch import Tensor

from nexus_adapters.bases.base import Base, CallingPipeline, CallLayout, Place
from nexus_adapters.bases.families import register_base
from nexus_adapters.bases.tokens import truncation_unlogged
from nexus_adapters.bases.unet_pipelines import TILED, guided_by_variable, is_stock, known_layout
from nexus_adapters.choices import PREDICTION_TYPES
from nexus_adapters.errors import InvalidArgument

KEYWORD = "down_intrablock_additional_residuals"

# Down-block types that accept a feature, and whether they add it after their downsampler.
_ADDS_AFTER_DOWNSAMPLER = {"CrossAttnDownBlock2D": False, "DownBlock2D": True}

# Only UNets of this depth (SDXL's) have a feature for the middle block.
_DOWN_BLOCKS_WITH_MIDDLE_FEATURE = 3

# Common names of bases, by the width of the prompt embeddings and by the strides and channels of the places.
_EMBEDDED = "the embedded base"
_KNOWN_BY_TEXT = {
    160: _EMBEDDED,
    768: "SD 1.x",
    1024: "SD 2.x",
    1280: "the SDXL refiner",
    2048: "SDXL",
    4096: "Kolors",
}
_KNOWN_BY_STRIDES: dict[tuple[int, ...], str] = {
    (1, 2, 4, 8): "SD 1.x/2.x",
    (2, 2, 4, 4): "SDXL",
    (2, 2, 4, 8): "the SDXL refiner",
}
_KNOWN_BY_CHANNELS: dict[tuple[int, ...], str] = {
    (96, 96, 96, 128): _EMBEDDED,
    (320, 640, 1280, 1280): "",  # of several bases, but not of the embedded one
}

_NATIVE_LATENTS = 64  # per side, if the config does not say


@register_base("unet")
class UNetBase(Base):
    """A base whose denoiser is a `UNet2DConditionModel`."""

    denoiser_name = "unet"
    denoiser_class = UNet2DConditionModel
    latents_argument = "sample"
    required_parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    @classmethod
    def pipeline_class(cls, index: Mapping[str, Any]) -> Any:
        """Return SDXL's pipeline if there is a second text encoder, whatever pipeline the folder is from."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        return StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline

    def places(self) -> tuple[Place, ...]:
        """Return one place per down block, and the middle block if there are exactly three down blocks."""
        channels = list(self.config["block_out_channels"])
        strides = self._strides()
        if len(strides) > len(channels):
            channels.append(channels[-1])
        return tuple(
            Place(width, stride, keyword=KEYWORD) for width, stride in zip(channels, strides, strict=True)
        )

    def _strides(self) -> list[int]:
        types: Sequence[str] = self.config["down_block_types"]
        last = len(types) - 1
        strides = []
        for level, name in enumerate(types):
            after_downsampler = _ADDS_AFTER_DOWNSAMPLER.get(name.removeprefix("UNetRes"))
            if after_downsampler is None:
                raise InvalidArgument(
                    "unet",
                    f"down blocks of types {' and '.join(_ADDS_AFTER_DOWNSAMPLER)}, which accept features",
                    f"{name} as down block {level + 1} of {len(types)}",
                )
            strides.append(2 ** (level + (after_downsampler and level < last)))
        if len(types) == _DOWN_BLOCKS_WITH_MIDDLE_FEATURE:
            if self.config["mid_block_type"] is None:
                raise InvalidArgument(
                    "unet",
                    "a middle block after exactly three down blocks, since it takes the fourth feature",
                    "mid_block_type=None",
                )
            strides.append(2**last)
        return strides

    @property
    def text_width(self) -> int:
        """`encoder_hid_dim` if the UNet projects the prompt embeddings itself, else `cross_attention_dim`.

        A loaded IP-Adapter changes `encoder_hid_dim_type` but not the text. `InvalidArgument` if the UNet
        reads no text, or reads it at several widths.
        """
        if self.config["encoder_hid_dim_type"] == "image_proj":
            raise InvalidArgument(
                "unet",
                "a UNet that reads prompt embeddings",
                "encoder_hid_dim_type='image_proj', which reads image embeddings instead",
            )
        if self.config["encoder_hid_dim"] is not None:
            return int(self.config["encoder_hid_dim"])
        width = self.config["cross_attention_dim"]
        widths = set(width) if isinstance(width, (list, tuple)) else {width}
        if len(widths) != 1:
            raise InvalidArgument(
                "unet", "one text width for all blocks", f"cross_attention_dim={tuple(width)}"
            )
        return int(widths.pop())

    @property
    def known_as(self) -> str:
        """The common name, by text width and strides."""
        try:
            text_width = self.text_width
        except InvalidArgument:  # no text, or several widths
            text_width = None
        return known_as(tuple(self._strides()), text_width)

    def feature_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (height, width) of the feature at every place, for latents of `height` x `width`.

        Each downsampler is a 3x3 convolution of stride 2. With padding 1 it rounds up. With padding 0,
        diffusers pads one row and one column at the end, so it rounds down.
        """
        padding = self.config.get("downsample_padding", 1)

        def size(side: int, stride: int) -> int:
            for _ in range(stride.bit_length() - 1):
                side = (side + (2 * padding or 1) - 3) // 2 + 1
            return side

        return [(size(height, place.stride), size(width, place.stride)) for place in self.places()]

    def check(self, source: str) -> None:
        """Reject inpainting UNets, VAEs with latent statistics, and schedules other than DDPM's."""
        vae = self.vae_config or {}
        inputs, outputs = self.config.get("in_channels", 4), self.config.get("out_channels", 4)
        if not inputs == outputs == self.latent_channels:
            raise InvalidArgument(
                "base",
                f"a UNet with {self.latent_channels} input and output channels, to match the VAE",
                f"'{source}', whose UNet has {inputs} and {outputs}",
            )
        for key in ("latents_mean", "latents_std"):
            if vae.get(key) is not None:
                raise InvalidArgument("base", f"a VAE without {key}", f"'{source}', which has one")
        config = getattr(self.scheduler, "config", None)
        if config is None:
            return
        if config.get("beta_schedule") is None:
            raise InvalidArgument(
                "base", "a scheduler with betas", f"a {config.get('_class_name')} in '{source}'"
            )
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise InvalidArgument(
                "base",
                f"a scheduler with prediction_type {' or '.join(PREDICTION_TYPES)}",
                f"{kind!r} in '{source}'",
            )

    # Calls

    def check_pipeline(self, pipe: Any) -> None:
        """Reject pipelines that denoise tile by tile."""
        names = {cls.__name__ for cls in type(pipe).__mro__}
        if names.intersection(TILED):
            raise InvalidArgument(
                "pipe_or_denoiser",
                "a pipeline that denoises the whole image at once",
                f"a {type(pipe).__name__}, which denoises tiles that the condition cannot match",
            )

    def check_call(self, argument: Callable[[str], Any]) -> None:
        """Reject a ControlNet's residuals for the down blocks alone, which the UNet would drop."""
        if argument("down_block_additional_residuals") is None:
            return
        if argument("mid_block_additional_residual") is None:
            raise InvalidArgument(
                "down_block_additional_residuals",
                f"mid_block_additional_residual in addition, as from a ControlNet, or {KEYWORD} instead",
                "it alone, which the UNet would drop",
            )

    def layout_of(self, calling: CallingPipeline, text: Tensor) -> CallLayout | None:
        """Return the layout by the table of diffusers' pipelines; None for an unknown pipeline."""
        layout = known_layout(calling.pipe)
        if layout is None or not is_stock(calling.loop):
            return None
        branches = layout(calling.pipe, calling.variables)
        whole = calling.variables.get("prompt_embeds")
        if layout is guided_by_variable and isinstance(whole, Tensor) and len(text) < len(whole):
            # Self-attention guidance calls the UNet again for the negatives, which get the same features.
            return CallLayout(whole, branches, called=0)
        return CallLayout(text, branches)

    def knows(self, pipe: Any) -> bool:
        """Return whether the class whose `__call__` it runs is in the table."""
        return known_layout(pipe) is not None

    # Encoding

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts: `prompt_embeds`, (b, n, d) float32, and for SDXL also `text_embeds`, (b, p)."""
        with truncation_unlogged(self.pipe):
            encoded = self.pipe.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        pooled = {"text_embeds": encoded[2].float()} if len(encoded) == 4 else {}
        return {"prompt_embeds": encoded[0].float(), **pooled}

    def encode_empty_prompt(self) -> dict[str, Tensor]:
        """Encode the empty prompt; zeros if the pipeline's config says so, as SDXL's does."""
        encoded = super().encode_empty_prompt()
        if self.pipe.config.get("force_zeros_for_empty_prompt", False):
            return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()}
        return encoded

    # Noise

    @cached_property
    def schedule(self) -> Any:
        """A `DDPMScheduler` with the pipeline's scheduler config."""
        kind: Any = DDPMScheduler
        return kind.from_config(self.scheduler.config)

    def noised(
        self, latents: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> tuple[Tensor, Tensor]:
        """Return (noisy latents, target): the target is the noise, or the velocity for v-prediction."""
        kind = self.schedule.config.prediction_type
        if kind not in PREDICTION_TYPES:
            raise InvalidArgument("scheduler.prediction_type", " or ".join(PREDICTION_TYPES), repr(kind))
        target = noise if kind == "epsilon" else self.schedule.get_velocity(latents, noise, t)
        return self.schedule.add_noise(latents, noise, t), target

    def loss_weights(self, t: Int[Tensor, " b"], min_snr_gamma: float) -> Float[Tensor, " b"]:
        """Return min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v_prediction.

        Both weight the clean latents' error by min(SNR, gamma). At SNR 0, pure noise, they are 1 and 0.
        """
        snr: Tensor = compute_snr(self.schedule, t)  # type: ignore[no-untyped-call]  # diffusers' own
        if self.schedule.config.prediction_type == "epsilon":
            return (min_snr_gamma / snr).clamp(max=1)
        return snr.clamp(max=min_snr_gamma) / (snr + 1)

    def noise_factors(self, timesteps: Tensor | float, noise_exponent: float) -> Float[Tensor, "..."]:
        """Return (1 - alphas_cumprod[t]) ** noise_exponent."""
        return noise_factors(self.scheduler, timesteps, noise_exponent)

    # What SDXL's UNet reads in addition to the text

    def added_arguments(self, added: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return SDXL's `added_cond_kwargs`; nothing for SD 1.x."""
        return {"added_cond_kwargs": dict(added)} if added else {}

    def native_size(self) -> int:
        """Return the side in pixels by the UNet's `sample_size`; a rectangle counts by its area."""
        size = self.config.get("sample_size") or _NATIVE_LATENTS
        side = size if isinstance(size, int) else round(math.sqrt(math.prod(size)))
        return side * self.pixels_per_latent

    def example_added(self, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return example `text_embeds` and `time_ids` for SDXL; nothing for SD 1.x."""
        if self.config.get("addition_embed_type") != "text_time":
            return {}
        width = self.config["projection_class_embeddings_input_dim"]
        width -= 6 * self.config["addition_time_embed_dim"]
        return {
            "text_embeds": torch.empty(count, width, dtype=dtype),
            "time_ids": torch.empty(count, 6, dtype=dtype),
        }


def known_as(
    strides: tuple[int, ...] = (), text_width: int | None = None, channels: tuple[int, ...] = ()
) -> str:
    """Return the common name of bases with this text width, or else with these places; "" if unknown.

    Only the strides count for places with unknown channels.
    """
    by_places = _KNOWN_BY_CHANNELS.get(channels) or _KNOWN_BY_STRIDES.get(strides, "")
    return _KNOWN_BY_TEXT.get(text_width or 0) or by_places


def check_kind(
    base: Base,
    strides: tuple[int, ...] = (),
    text_widths: tuple[object, object] = (None, None),
    channels: tuple[int, ...] = (),
) -> None:
    """Raise `InvalidArgument` named "adapter" for an adapter for another kind of base, with both names.

    Args:
        base: the base.
        strides: strides of the places that the adapter was made for; () if unknown.
        text_widths: text width of the adapter and of the base, as in a config. Not an int: unknown.
        channels: channels of the places that the adapter was made for; () if unknown.
    """
    places = base.places()
    needed = tuple(place.stride for place in places) if strides else ()
    by_strides = {known_as(strides), known_as(needed)} - {""}
    widths = [width if isinstance(width, int) else None for width in text_widths]
    by_text = {known_as((), width) for width in widths} - {""}
    both = (channels, tuple(place.channels for place in places))
    by_channels = {_KNOWN_BY_CHANNELS[each] for each in both if each in _KNOWN_BY_CHANNELS}
    if base.known_as and max(len(by_strides), len(by_text), len(by_channels)) > 1:
        raise InvalidArgument(
            "adapter",
            f"an adapter for {base.known_as}, to match the base",
            f"an adapter for {known_as(strides, widths[0], channels)}",
        )


def noise_factors(scheduler: Any, timesteps: Tensor | float, noise_exponent: float) -> Float[Tensor, "..."]:
    """Return (1 - alphas_cumprod[t]) ** noise_exponent: the noise's share of the variance, to a power.

    Features of an adapter with this `noise_exponent` are multiplied by it: it is near 1 in the first steps,
    which decide structure, and near 0 in the last steps, which add details. Pass it to
    `residuals(features, scale=...)`.

    Args:
        scheduler: a diffusers scheduler with `alphas_cumprod`, as every Stable Diffusion has.
        timesteps: 0 to num_train_timesteps, of any shape; fractional timesteps are interpolated.
        noise_exponent: the power; 0 gives ones.

    Returns:
        float32 in [0, 1], in the shape and on the device of `timesteps`.

    Raises:
        InvalidArgument: for a scheduler without `alphas_cumprod`.
    """
    products = getattr(scheduler, "alphas_cumprod", None)
    is_flow = getattr(scheduler, "config", {}).get("use_flow_sigmas", False)  # keeps an unused alphas_cumprod
    if not isinstance(products, Tensor) or is_flow:
        flow = " with use_flow_sigmas" if is_flow else ""
        raise InvalidArgument(
            "noise_exponent",
            "a scheduler with alphas_cumprod, which gives the noise in each step",
            f"a {type(scheduler).__name__}{flow}",
            "noise_exponent=0 works with every scheduler, but an adapter trained with a larger exponent is "
            "then too strong in late steps",
        )
    times = torch.as_tensor(timesteps)
    shares = 1 - products.to(times.device, torch.float32)
    places = times.float().clamp(0, len(shares) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(shares) - 1)
    return torch.lerp(shares[below], shares[above], places - below).clamp(0, 1) ** noise_exponent
