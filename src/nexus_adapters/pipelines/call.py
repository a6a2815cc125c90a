"""What all pipelines with an adapter share: attach, generate, detach."""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers.pipelines.pipeline_loading_utils import CUSTOM_PIPELINE_FILE_NAME, LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.bases.families import base_of
from nexus_adapters.choices import MAX_MEGAPIXELS, ResizeMode
from nexus_adapters.errors import InvalidArgument, renamed, warn_caller
from nexus_adapters.files import write_text
from nexus_adapters.injection.attach import attach
from nexus_adapters.injection.compatibility import check_fit, check_pixels
from nexus_adapters.injection.condition import ConditionLike, check_aspect, image_size
from nexus_adapters.injection.control import Control
from nexus_adapters.library_logs import logs_hidden

F = TypeVar("F", bound=Callable[..., Any])

# Else diffusers takes the adapter of a pipeline on the Hub for a file of code that is missing there.
LOADABLE_CLASSES.setdefault("nexus_adapters", {"NexusAdapter": ["save_pretrained", "from_pretrained"]})

# The pipelines' arguments for a control's settings.
_NAMES = {
    "condition": "image",
    "scale": "adapter_conditioning_scale",
    "start": "control_guidance_start",
    "end": "control_guidance_end",
}

# What a saved pipeline has as its pipeline.py.
_CODE_BEGINS = '"""The class of this pipeline, for `custom_pipeline`. It is in the package nexus-adapters."""'
_CODE = (
    _CODE_BEGINS
    + """

from nexus_adapters import {name}

__all__ = ["{name}"]
"""
)

# What the stock calls take in their **kwargs. They ignore everything else there, misspelled options too.
_DEPRECATED = {"callback", "callback_steps"}


def with_stock_arguments(stock: type[DiffusionPipeline]) -> Callable[[F], F]:
    """Give a `__call__` the stock one's signature plus its own keyword-only arguments, for help()."""

    def decorate(call: F) -> F:
        signature = inspect.signature(stock.__call__)
        theirs, own = signature.parameters.values(), inspect.signature(call).parameters.values()
        shown = [p for p in theirs if p.kind is not p.VAR_KEYWORD]
        shown += [p for p in own if p.kind is p.KEYWORD_ONLY]
        shown += [p for p in theirs if p.kind is p.VAR_KEYWORD]
        vars(call)["__signature__"] = signature.replace(parameters=shown)
        return call

    return decorate


class NexusPipelineMixin:
    """Generation under one adapter, for a subclass of a stock pipeline that comes behind in the bases.

    The subclass takes `adapter` in its constructor, and calls `register_adapter`.
    """

    # The stock pipeline's class, whether its UNet reads size and crop, and what its base is called.
    stock: ClassVar[type[DiffusionPipeline]]
    added_embedding: ClassVar[str | None]
    base_name: ClassVar[str]

    @classmethod
    def check_base(cls, unet: Any, name: str) -> None:
        """`InvalidArgument` for a UNet of another kind of base; `name` is what has it."""
        if unet is None:
            return
        found = unet.config.get("addition_embed_type")
        if found != cls.added_embedding:
            raise InvalidArgument(
                "unet",
                f"one of {cls.base_name}, with addition_embed_type {cls.added_embedding!r}",
                f"one with {found!r} in a {name}",
                "attach() works with it as it is",
            )

    def register_adapter(self, adapter: NexusAdapter | None) -> None:
        """Make the adapter a part of the pipeline; `InvalidArgument`, with both numbers, unless it fits.

        As in diffusers, parts may be None, for example to encode prompts only. The fit is then not checked.
        """
        pipe: Any = self
        if adapter is not None and pipe.unet is not None:
            base, _ = base_of(pipe)
            check_fit(adapter, base)
            check_pixels(adapter, base, None if pipe.vae is None else pipe.vae_scale_factor)
        pipe.register_modules(adapter=adapter)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline of another's parts, and `adapter=adapter`; diffusers' own arguments, all of them.

        The parts, which both pipelines share, keep the precision of the other's UNet, and the adapter takes
        it. `torch_dtype` gives them all another one; diffusers' own default would make them float32.
        """
        name = type(pipeline).__name__
        unet = getattr(pipeline, "unet", None)
        if unet is None:
            raise InvalidArgument("pipeline", f"one of {cls.base_name}", f"a {name}")
        cls.check_base(unet, name)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["torch_dtype"] = unet.dtype
        with warnings.catch_warnings(), logs_hidden():
            # Newer diffusers call it `dtype`, which older ones refuse.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            from_pipe: Any = super().from_pipe  # type: ignore[misc]  # the stock pipeline's
            return from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move all parts to a device or dtype; diffusers' own arguments, all of them."""
        to: Any = super().to  # type: ignore[misc]  # the stock pipeline's
        with logs_hidden():
            return to(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save all parts into a folder; diffusers' own arguments, all of them.

        A file pipeline.py is added, with which `DiffusionPipeline.from_pretrained(folder,
        custom_pipeline="pipeline", trust_remote_code=True)` finds this class without an import; a file of
        your own of that name is kept. The adapter is always saved as safetensors.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]  # the stock pipeline's
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        if given.get("safe_serialization", True) is not True:
            warn_caller(
                "safe_serialization=False: the adapter is saved as safetensors anyway, because a pickle can "
                "contain code"
            )
        code = Path(save_directory) / CUSTOM_PIPELINE_FILE_NAME
        # Before the rest, since the folder may be uploaded at the end.
        if not code.exists() or code.read_text(encoding="utf-8", errors="replace").startswith(_CODE_BEGINS):
            kind = next(cls for cls in type(self).__mro__ if cls.__module__ == "nexus_adapters")
            code.parent.mkdir(parents=True, exist_ok=True)
            write_text(code, _CODE.format(name=kind.__name__))
        save(save_directory, *args, **kwargs)

    def generate(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        image: ConditionLike | Any,
        scale: Any,
        start: float | int,
        end: float | int,
        policy: str,
        maps: Mapping[str, Any],
    ) -> Any:
        """The stock call with these arguments, under a control with those settings.

        All are checked before anything is computed; the settings by `Control` alone, so that the condition is
        copied, and an accelerator waited for, once. `maps` are those that say how to read and fit it.
        """
        pipe: Any = self
        for name in ("unet", "adapter"):
            if getattr(pipe, name) is None:
                raise InvalidArgument(
                    name, hint="This pipeline was built without it and can only encode prompts"
                )
        signature = inspect.signature(self.stock.__call__)
        call = signature.bind(self, *args, **kwargs)
        unknown = sorted(set(call.arguments.pop("kwargs", {})) - _DEPRECATED)
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        given = dict(call.arguments)
        if any(isinstance(given.get(name), Image | Tensor | list) for name in ("prompt_2", "height")):
            _check_not_an_image(given)
        with renamed(_argument_name):
            control = Control(pipe.adapter, image, scale, start, end, policy=policy, **maps)
        condition = control.condition
        check_counts(len(condition), _prompt_count(given), given.get("num_images_per_prompt") or 1)
        base, _ = base_of(pipe)
        height, width = output_height_width(
            condition,
            given.get("height"),
            given.get("width"),
            base.native_size(),
            pipe.vae_scale_factor,
            control.resize_mode,
        )
        given |= {name: kwargs[name] for name in _DEPRECATED & set(kwargs)}
        given |= {"height": height, "width": width}
        del given["self"]
        with attach(pipe, control, shared=False):
            return self.stock.__call__(pipe, **given)


def _argument_name(setting: str) -> str:
    """The pipeline's argument for a setting of `Control`, also for "scale[1]" or "start, end"."""
    parts = [part.partition("[") for part in setting.split(", ")]
    return ", ".join(_NAMES.get(name, name) + bracket + rest for name, bracket, rest in parts)


def _check_not_an_image(given: dict[str, Any]) -> None:
    """`InvalidArgument` where an image was given by position, as diffusers' T2I pipelines take it."""
    second = given.get("prompt_2")
    is_image = isinstance(second, Image | Tensor) or (
        isinstance(second, list) and any(isinstance(part, Image | Tensor) for part in second)
    )
    if is_image or isinstance(given.get("height"), Image | Tensor | list):
        raise InvalidArgument("image", "a keyword argument, `image=...`", "an image by position")


def _prompt_count(given: dict[str, Any]) -> int | None:
    """How many prompts the call has; None where it has none, which the stock pipeline refuses."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:
        return None if embeds is None else len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1  # anything else the stock pipeline refuses


def check_counts(conditions: int, prompts: int | None, images_per_prompt: int) -> None:
    """`InvalidArgument` unless the conditions can be dealt out evenly among each prompt's images."""
    if prompts is None:
        return
    if prompts == 0:
        raise InvalidArgument("prompt", "at least one prompt", "an empty list")
    whole_prompts_each = prompts % conditions == 0
    several_each_prompt = conditions % prompts == 0 and images_per_prompt % (conditions // prompts) == 0
    if not whole_prompts_each and not several_each_prompt:
        raise InvalidArgument(
            "image",
            f"one condition for all {prompts} prompts of {images_per_prompt} images each, or as many as "
            "prompts or images",
            conditions,
        )


def _is_positive_integer(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value) > 0


def output_height_width(
    condition: Float[Tensor, "k c h w"],
    height: int | Any,
    width: int | Any,
    native: int,
    multiple: int,
    resize_mode: ResizeMode | None = None,
) -> tuple[int, int]:
    """Of the image that is generated, from what is given and from the condition by `image_size`.

    `InvalidArgument` where both are given in another aspect and no `resize_mode` fits it, or the condition is
    smaller than `multiple`; for sides that are no positive integers, and for more than 64 megapixels.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None and not _is_positive_integer(side):
            raise InvalidArgument(name, "a positive integer", repr(side))
    from_height, from_width = condition.shape[2:]
    if min(from_height, from_width) < multiple:
        raise InvalidArgument("image", f"at least {multiple} pixels per side", f"{from_width}x{from_height}")
    height, width = image_size((from_height, from_width), height, width, native, multiple)
    if height * width > MAX_MEGAPIXELS * 1_000_000:
        expected = f"an image of at most {MAX_MEGAPIXELS} megapixels"
        raise InvalidArgument("height, width", expected, f"{width}x{height}")
    if resize_mode is None:
        check_aspect(from_height, from_width, height, width, name="image")
    return height, width
