"""Shared by all pipelines with an adapter: attach, generate, detach."""

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

# Without this, diffusers would look for a code file for the adapter in a pipeline's repository on the Hub.
LOADABLE_CLASSES.setdefault("nexus_adapters", {"NexusAdapter": ["save_pretrained", "from_pretrained"]})

# Setting of a control -> the pipelines' argument for it.
_NAMES = {
    "condition": "image",
    "scale": "adapter_conditioning_scale",
    "start": "control_guidance_start",
    "end": "control_guidance_end",
}

# Content of a saved pipeline's pipeline.py.
_CODE_BEGINS = '"""The class of this pipeline, for `custom_pipeline`. It is in the package nexus-adapters."""'
_CODE = (
    _CODE_BEGINS
    + """

from nexus_adapters import {name}

__all__ = ["{name}"]
"""
)

# Accepted by the stock calls in **kwargs, where they ignore everything else, even misspelled options.
_DEPRECATED = {"callback", "callback_steps"}


def with_stock_arguments(stock: type[DiffusionPipeline]) -> Callable[[F], F]:
    """Give a `__call__` the signature of the stock one plus its own keyword-only arguments, for help()."""

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
    """Generation with one adapter, for a subclass of a stock pipeline; list it before the stock pipeline.

    The subclass takes `adapter` in its constructor and calls `register_adapter`.
    """

    # The stock pipeline's class, its UNet's `addition_embed_type`, and the base's name in errors.
    stock: ClassVar[type[DiffusionPipeline]]
    added_embedding: ClassVar[str | None]
    base_name: ClassVar[str]

    @classmethod
    def check_base(cls, unet: Any, name: str) -> None:
        """Raise `InvalidArgument` for a UNet of another kind of base; `name` is the class that has it."""
        if unet is None:
            return
        found = unet.config.get("addition_embed_type")
        if found != cls.added_embedding:
            raise InvalidArgument(
                "unet",
                f"a UNet of {cls.base_name}, with addition_embed_type {cls.added_embedding!r}",
                f"a UNet with {found!r} in a {name}",
                "Use attach() with the pipeline instead",
            )

    def register_adapter(self, adapter: NexusAdapter | None) -> None:
        """Make the adapter a part of the pipeline.

        As in diffusers, parts may be None, for example to only encode prompts; then the fit is not checked.

        Raises:
            InvalidArgument: if the adapter does not fit the UNet, with both numbers.
        """
        pipe: Any = self
        if adapter is not None and pipe.unet is not None:
            base, _ = base_of(pipe)
            check_fit(adapter, base)
            check_pixels(adapter, base, None if pipe.vae is None else pipe.vae_scale_factor)
        pipe.register_modules(adapter=adapter)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Create a pipeline from the parts of another one and `adapter=adapter`.

        Takes all arguments of diffusers' `from_pipe`. Both pipelines share the parts. By default, all parts
        and the adapter get the dtype of the UNet (diffusers' own default would be float32); `torch_dtype`
        changes it.
        """
        name = type(pipeline).__name__
        unet = getattr(pipeline, "unet", None)
        if unet is None:
            raise InvalidArgument("pipeline", f"a pipeline of {cls.base_name}", f"a {name}")
        cls.check_base(unet, name)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["torch_dtype"] = unet.dtype
        with warnings.catch_warnings(), logs_hidden():
            # Newer diffusers call it `dtype`, which older ones do not accept.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            from_pipe: Any = super().from_pipe  # type: ignore[misc]  # the stock pipeline's
            return from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move all parts to a device or dtype; diffusers' own arguments, all of them."""
        to: Any = super().to  # type: ignore[misc]  # the stock pipeline's
        with logs_hidden():
            return to(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save all parts into a folder. Takes all arguments of diffusers' `save_pretrained`.

        A file pipeline.py is added, so that `DiffusionPipeline.from_pretrained(folder,
        custom_pipeline="pipeline", trust_remote_code=True)` finds this class without an import; your own file
        of this name is kept. The adapter is always saved as safetensors.
        """
        save: Any = super().save_pretrained  # type: ignore[misc]  # the stock pipeline's
        given = inspect.signature(save).bind(save_directory, *args, **kwargs).arguments
        if given.get("safe_serialization", True) is not True:
            warn_caller(
                "safe_serialization=False: the adapter is saved as safetensors anyway, because a pickle can "
                "contain code"
            )
        code = Path(save_directory) / CUSTOM_PIPELINE_FILE_NAME
        # Written first, since saving may end with an upload of the folder.
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
        """Call the stock pipeline with these arguments, with a control attached.

        Everything is checked before anything is computed. Only `Control` checks the settings, so the
        condition is copied, and an accelerator synchronized, once. `maps` holds the settings for reading and
        fitting it.
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
            ours = f". Did you mean {_NAMES[unknown[0]]!r}?" if unknown[0] in _NAMES else ""
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}{ours}"
            )
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
    """Return the pipeline's argument for a setting of `Control`, also for "scale[1]" or "start, end"."""
    parts = [part.partition("[") for part in setting.split(", ")]
    return ", ".join(_NAMES.get(name, name) + bracket + rest for name, bracket, rest in parts)


def _check_not_an_image(given: dict[str, Any]) -> None:
    """Raise `InvalidArgument` for a positional image, which diffusers' T2I-Adapter pipelines accept."""
    second = given.get("prompt_2")
    is_image = isinstance(second, Image | Tensor) or (
        isinstance(second, list) and any(isinstance(part, Image | Tensor) for part in second)
    )
    if is_image or isinstance(given.get("height"), Image | Tensor | list):
        raise InvalidArgument("image", "a keyword argument, `image=...`", "a positional argument")


def _prompt_count(given: dict[str, Any]) -> int | None:
    """Return the number of prompts; None if there are none, which the stock pipeline rejects."""
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:
        return None if embeds is None else len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1  # the stock pipeline rejects other types


def check_counts(conditions: int, prompts: int | None, images_per_prompt: int) -> None:
    """Raise `InvalidArgument` unless the conditions can be distributed evenly over each prompt's images."""
    if prompts is None:
        return
    if prompts == 0:
        raise InvalidArgument("prompt", "at least one prompt", "an empty list")
    whole_prompts_each = prompts % conditions == 0
    several_each_prompt = conditions % prompts == 0 and images_per_prompt % (conditions // prompts) == 0
    if not whole_prompts_each and not several_each_prompt:
        raise InvalidArgument(
            "image",
            f"one condition for all {prompts} prompts with {images_per_prompt} images each, or one per "
            "prompt or per image",
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
    """Return (height, width) of the generated image, from the given sides and the condition (`image_size`).

    Raises:
        InvalidArgument: if the aspect ratio differs from the condition's and there is no `resize_mode`; if
            the condition is smaller than `multiple`; for sides that are not positive integers; and for more
            than 64 megapixels.
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
