"""Stable Diffusion with a Nexus adapter as one pipeline: attach, generate, detach."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.injection.attach import attach
from nexus_adapters.injection.condition import ConditionLike, as_condition, check_aspect, size_by_aspect
from nexus_adapters.injection.control import Control, check_number, check_window
from nexus_adapters.injection.fit import check_fit, check_pixels, traits

F = TypeVar("F", bound=Callable[..., Any])

# Else diffusers takes the adapter of a pipeline on the Hub for a file of code that is missing there.
LOADABLE_CLASSES.setdefault("nexus_adapters", {"NexusAdapter": ["save_pretrained", "from_pretrained"]})

_STOCK_CALL = inspect.signature(StableDiffusionPipeline.__call__)
# What the stock call takes in its **kwargs. It ignores everything else there, misspelled options too.
_DEPRECATED = {"callback", "callback_steps"}


def _with_stock_arguments(call: F) -> F:
    """Give `call` the stock call's signature plus its own keyword-only arguments, for help() and the like."""
    stock, own = _STOCK_CALL.parameters.values(), inspect.signature(call).parameters.values()
    shown = [p for p in stock if p.kind is not p.VAR_KEYWORD]
    shown += [p for p in own if p.kind is p.KEYWORD_ONLY]
    shown += [p for p in stock if p.kind is p.VAR_KEYWORD]
    vars(call)["__signature__"] = _STOCK_CALL.replace(parameters=shown)
    return call


class StableDiffusionNexusPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose images follow a structure map through a `NexusAdapter`.

    Made from a base's parts, `StableDiffusionNexusPipeline(**base.components, adapter=adapter)`, or
    `from_pipe(base, adapter=adapter)`, or `from_pretrained` of a base's folder with `adapter=adapter` or of a
    folder that `save_pretrained` of this class wrote.

    Raises:
        ValueError: where the adapter does not fit the UNet, with both numbers.
    """

    # diffusers resolves classes by this name; it must survive moves of this file.
    __module__ = "nexus_adapters"

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        adapter: NexusAdapter,
        scheduler: KarrasDiffusionSchedulers | Any,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
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
        check_base(unet, type(unet).__name__)
        super().__init__(**stock, requires_safety_checker=requires_safety_checker)
        check_fit(adapter, unet)
        check_pixels(adapter, unet, self.vae_scale_factor)
        self.register_modules(adapter=adapter)  # type: ignore[no-untyped-call]  # diffusers' own

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline of another's parts, and `adapter=adapter`; diffusers' own arguments, all of them.

        The parts, which both pipelines share, keep the precision of the other's UNet, and the adapter takes
        it. `torch_dtype` gives them all another one; diffusers' own default would make them float32.
        """
        name = type(pipeline).__name__
        unet = getattr(pipeline, "unet", None)
        if unet is None:
            raise ValueError(f"pipeline: expected a Stable Diffusion 1.x or 2.x one; received a {name}")
        check_base(unet, name)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["torch_dtype"] = unet.dtype
        with warnings.catch_warnings():  # newer diffusers call it `dtype`, which older ones refuse
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            return super().from_pipe(pipeline, **kwargs)  # type: ignore[no-untyped-call]  # diffusers' own

    @_with_stock_arguments
    def __call__(
        self,
        *args: Any,
        image: ConditionLike | Any = None,
        adapter_conditioning_scale: float | int = 1.0,
        control_guidance_start: float | int = 0.0,
        control_guidance_end: float | int = 1.0,
        policy: str = "positive",
        **kwargs: Any,
    ) -> Any:
        """Generate. All arguments of `StableDiffusionPipeline.__call__`, and these:

        Args:
            *args: as in the stock pipeline, in its order.
            image: the condition: a PIL image, a tensor (K, 3, H, W) in [0, 1], or a list of PIL images or of
                tensors (3, H, W) or (1, 3, H, W). Required. One serves all prompts; K serve K prompts, or an
                equal number of consecutive prompts or of images of one prompt each.
            adapter_conditioning_scale: factor of the adapter's features; 0 is exactly the base model.
            control_guidance_start: where in the noise schedule the adapter begins to act, in [0, 1]. Position
                is 1 - t / num_train_timesteps, not the share of steps taken as in diffusers' ControlNet.
            control_guidance_end: where it ceases to; 0 and 1 always include the ends.
            policy: which text the adapter reads: "positive", "per_branch" or "cond_only", as in `Control`.
            **kwargs: as in the stock pipeline. Without `height` and `width` the image takes the condition's
                size, each side rounded down to a multiple of the VAE's factor (8), to which the condition is
                then resized; with one of them, the other follows from the condition's aspect.

        Returns:
            What the stock pipeline returns.

        Raises:
            ValueError: names the argument, what was expected and what came.
            TypeError: for an argument that the stock pipeline does not have.
        """
        call = _STOCK_CALL.bind(self, *args, **kwargs)
        unknown = sorted(set(call.arguments.pop("kwargs", {})) - _DEPRECATED)
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        given = dict(call.arguments)
        if isinstance(given.get("height"), Image | Tensor | list):
            raise ValueError("image: expected by keyword, `image=...`; received by position")
        condition = as_condition(image, traits(self.adapter).in_channels, name="image")
        scale = check_number(adapter_conditioning_scale, "adapter_conditioning_scale")
        window = check_window(
            control_guidance_start, control_guidance_end, ("control_guidance_start", "control_guidance_end")
        )
        check_counts(len(condition), _prompt_count(given), given.get("num_images_per_prompt") or 1)
        control = Control(self.adapter, condition, scale, *window, policy=policy)
        size = image_size(condition, given.get("height"), given.get("width"), self.vae_scale_factor)
        given |= {name: kwargs[name] for name in _DEPRECATED & set(kwargs)}
        given |= {"height": size[0], "width": size[1]}
        del given["self"]
        with attach(self, control, shared=False):
            return super().__call__(**given)


def check_base(unet: Any, name: str) -> None:
    """ValueError for a UNet that reads more than Stable Diffusion 1.x's and 2.x's; `name` is what has it."""
    embedding = unet.config.get("addition_embed_type")
    if embedding is not None:
        raise ValueError(
            f"unet: expected one of Stable Diffusion 1.x or 2.x; received one of Stable Diffusion XL's kind "
            f"(addition_embed_type {embedding!r}) in a {name}. attach() works with it as it is"
        )


def _prompt_count(given: dict[str, Any]) -> int | None:
    """How many prompts the call has; None where it has none, which the stock pipeline refuses."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:
        return None if embeds is None else len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1  # anything else the stock pipeline refuses


def check_counts(conditions: int, prompts: int | None, images_per_prompt: int) -> None:
    """ValueError unless the conditions can be dealt out without splitting a prompt's images unevenly."""
    if prompts is None:
        return
    if prompts == 0:
        raise ValueError("prompt: expected at least one; received an empty list")
    whole_prompts_each = prompts % conditions == 0
    several_each_prompt = conditions % prompts == 0 and images_per_prompt % (conditions // prompts) == 0
    if not whole_prompts_each and not several_each_prompt:
        raise ValueError(
            f"image: expected one condition for all {prompts} prompts of {images_per_prompt} images each, or "
            f"as many as prompts or images; received {conditions}"
        )


def image_size(
    condition: Float[Tensor, "k c h w"], height: int | None, width: int | None, multiple: int
) -> tuple[int, int]:
    """(height, width) of the image, from what is given and from the condition by `size_by_aspect`.

    ValueError where both are given in another aspect, or the condition is smaller than `multiple`.
    """
    from_height, from_width = condition.shape[2:]
    if min(from_height, from_width) < multiple:
        raise ValueError(
            f"image: expected at least {multiple} pixels per side; received {from_height}x{from_width}"
        )
    size = size_by_aspect(from_height, from_width, height, width, multiple)
    check_aspect(from_height, from_width, *size, name="image")
    return size
