"""Stable Diffusion XL with a Nexus adapter as one pipeline."""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
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
from nexus_adapters.injection.condition import ConditionLike
from nexus_adapters.injection.strength import Scale
from nexus_adapters.pipelines.call import NexusPipelineMixin, with_stock_arguments


class StableDiffusionXLNexusPipeline(NexusPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` whose images follow a structure map through a `NexusAdapter`.

    Made as `StableDiffusionNexusPipeline` is. The adapter reads the embeddings of both text encoders, side by
    side, as the UNet does.

    Raises:
        InvalidArgument: where the adapter does not fit the UNet, with both numbers.
    """

    # diffusers resolves classes by this name; it must survive moves of this file.
    __module__ = "nexus_adapters"

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->adapter->unet->vae"

    stock = StableDiffusionXLPipeline
    added_embedding = "text_time"
    base_name = "Stable Diffusion XL"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapter: NexusAdapter,
        scheduler: KarrasDiffusionSchedulers | Any,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
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
        policy: str = "positive",
        **kwargs: Any,
    ) -> Any:
        """Generate. All arguments of `StableDiffusionXLPipeline.__call__`, and those of the other pipeline.

        What `StableDiffusionNexusPipeline` says of `image`, which is required, and of the others holds here.
        """
        window = control_guidance_start, control_guidance_end
        return self.generate(args, kwargs, image, adapter_conditioning_scale, window, policy)
