"""Stable Diffusion 1.x, 2.x and XL with a Nexus adapter as one pipeline."""

from collections.abc import Sequence
from typing import Any, Optional, Union

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.choices import DEFAULT_POLICY, MapKind, ResizeMode
from nexus_adapters.injection.condition import ConditionLike
from nexus_adapters.injection.scales import Scale
from nexus_adapters.pipelines.call import NexusPipelineMixin, with_stock_arguments

# diffusers reads the types in signatures; before 0.38 it understands `Optional[X]`, but not `X | None`.


class StableDiffusionNexusPipeline(NexusPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose images follow a structure map through a `NexusAdapter`.

    Create it with `from_pipe(base, adapter=adapter)`; with `from_pretrained(folder, adapter=adapter)` from a
    base's folder or Hub id; with `from_pretrained(folder)` from a folder saved by this class; or from a
    base's parts, `StableDiffusionNexusPipeline(**base.components, adapter=adapter)`.

    Raises:
        InvalidArgument: if the adapter does not fit the UNet, with both numbers.
    """

    # diffusers resolves classes by this name; it must not change if this file moves.
    __module__ = "nexus_adapters"

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"

    stock = StableDiffusionPipeline
    added_embedding = None
    base_name = "Stable Diffusion 1.x or 2.x"

    def __init__(
        self,
        vae: Optional[AutoencoderKL],
        text_encoder: Optional[CLIPTextModel],
        tokenizer: Optional[CLIPTokenizer],
        unet: Optional[UNet2DConditionModel],
        adapter: Optional[NexusAdapter],
        scheduler: Union[KarrasDiffusionSchedulers, Any],
        safety_checker: Optional[StableDiffusionSafetyChecker],
        feature_extractor: Optional[CLIPImageProcessor],
        image_encoder: Optional[CLIPVisionModelWithProjection] = None,
        requires_safety_checker: bool = True,
    ) -> None:
        stock: dict[str, Any] = {
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": scheduler,
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
        }
        self.check_base(unet, type(unet).__name__)
        super().__init__(**stock, requires_safety_checker=requires_safety_checker)
        self.register_adapter(adapter)

    @with_stock_arguments(StableDiffusionPipeline)
    def __call__(
        self,
        *args: Any,
        image: ConditionLike | Any = None,
        adapter_conditioning_scale: Scale | Any = 1.0,
        control_guidance_start: float | int = 0.0,
        control_guidance_end: float | int = 1.0,
        policy: str = DEFAULT_POLICY,
        kind: MapKind | Any = None,
        resize_mode: ResizeMode | Any = None,
        invert: bool | Any = None,
        image_scales: Sequence[float] | Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate images. Takes all arguments of `StableDiffusionPipeline.__call__`, and the following.

        Args:
            *args: as in the stock pipeline, in its order.
            image: the condition, required: a PIL image, a tensor (3, H, W) or (K, 3, H, W), or a NumPy array
                (H, W), (H, W, 3), (3, H, W), (K, H, W, 3) or (K, 3, H, W), of floats in [0, 1], uint8, or
                uint16 if gray, or a list of K of these. One condition is used for all prompts; K conditions
                are used for K prompts, for groups of consecutive prompts, or for the images of each prompt.
            adapter_conditioning_scale: factor of the adapter's features; 0 is exactly the base model. Also a
                function of the position in the schedule, or a list for its equal parts, as in `Control`.
            control_guidance_start: where in the noise schedule the adapter starts to act, in [0, 1]. The
                position is 1 - t / num_train_timesteps, not the share of steps as in diffusers' ControlNet.
                0 always includes the first step.
            control_guidance_end: where it stops acting, in [0, 1]. 1 always includes the last step.
            policy: which text the adapter reads: "positive", "per_branch" or "cond_only", as in `Control`.
            kind: kind of the condition: "lines", "labels", "depth" or "image"; None guesses it by its pixels.
            resize_mode: "stretch", "crop" or "pad" for a condition whose aspect ratio differs from `height`
                and `width`; None raises an error.
            invert: whether to invert the condition; None inverts dark lines on white, with a warning.
            image_scales: an additional factor of the adapter's features for each of K conditions.
            **kwargs: as in the stock pipeline. Without `height` and `width`, the image gets the condition's
                size, each side rounded down to a multiple of the VAE's factor (8), and the condition is
                resized to it. If a side is more than 1.5 times the base's native size (512 pixels for SD
                1.x), the image gets the base's area in the condition's aspect ratio, with a warning. If only
                one of them is given, the other follows from the condition's aspect ratio.

        Returns:
            What the stock pipeline returns.

        Raises:
            InvalidArgument: names the argument, what was expected and what was received.
            TypeError: for an argument that the stock pipeline does not have.
        """
        interval = control_guidance_start, control_guidance_end
        maps = {"kind": kind, "resize_mode": resize_mode, "invert": invert, "image_scales": image_scales}
        return self.generate(args, kwargs, image, adapter_conditioning_scale, *interval, policy, maps)


class StableDiffusionXLNexusPipeline(NexusPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose images follow a structure map through a `NexusAdapter`.

    Create it like `StableDiffusionNexusPipeline`. Like the UNet, the adapter reads the concatenated
    embeddings of both text encoders.

    Raises:
        InvalidArgument: if the adapter does not fit the UNet, with both numbers.
    """

    # diffusers resolves classes by this name; it must not change if this file moves.
    __module__ = "nexus_adapters"

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->adapter->unet->vae"

    stock = StableDiffusionXLPipeline
    added_embedding = "text_time"
    base_name = "Stable Diffusion XL"

    def __init__(
        self,
        vae: Optional[AutoencoderKL],
        text_encoder: Optional[CLIPTextModel],
        text_encoder_2: Optional[CLIPTextModelWithProjection],
        tokenizer: Optional[CLIPTokenizer],
        tokenizer_2: Optional[CLIPTokenizer],
        unet: Optional[UNet2DConditionModel],
        adapter: Optional[NexusAdapter],
        scheduler: Union[KarrasDiffusionSchedulers, Any],
        image_encoder: Optional[CLIPVisionModelWithProjection] = None,
        feature_extractor: Optional[CLIPImageProcessor] = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: Optional[bool] = None,
    ) -> None:
        stock: dict[str, Any] = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "unet": unet,
            "scheduler": scheduler,
            "image_encoder": image_encoder,
            "feature_extractor": feature_extractor,
        }
        self.check_base(unet, type(unet).__name__)
        super().__init__(
            **stock,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_adapter(adapter)

    @with_stock_arguments(StableDiffusionXLPipeline)
    def __call__(
        self,
        *args: Any,
        image: ConditionLike | Any = None,
        adapter_conditioning_scale: Scale | Any = 1.0,
        control_guidance_start: float | int = 0.0,
        control_guidance_end: float | int = 1.0,
        policy: str = DEFAULT_POLICY,
        kind: MapKind | Any = None,
        resize_mode: ResizeMode | Any = None,
        invert: bool | Any = None,
        image_scales: Sequence[float] | Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate images. Takes all arguments of `StableDiffusionXLPipeline.__call__`, and a few more.

        For `image`, which is required, and the others, see `StableDiffusionNexusPipeline.__call__`.
        """
        interval = control_guidance_start, control_guidance_end
        maps = {"kind": kind, "resize_mode": resize_mode, "invert": invert, "image_scales": image_scales}
        return self.generate(args, kwargs, image, adapter_conditioning_scale, *interval, policy, maps)
