"""Which guidance branches each diffusers pipeline passes to its UNet, and which pipelines denoise tiles."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from nexus_adapters.bases.base import Branches

# Returns the branches of the prompt embeddings that a pipeline is using now, from attributes of its class or
# variables of its `__call__`.
Layout = Callable[[Any, Mapping[str, Any]], Branches]

TILED = ("StableDiffusionPanoramaPipeline",)


def _single(_: Any, __: Mapping[str, Any]) -> Branches:
    return (True,)


def _guided(pipe: Any, _: Mapping[str, Any]) -> Branches:
    return (False, True) if pipe.do_classifier_free_guidance else (True,)


def guided_by_variable(_: Any, variables: Mapping[str, Any]) -> Branches:
    """Return the branches of pipelines that store in a variable of `__call__` whether they use guidance."""
    return (False, True) if variables["do_classifier_free_guidance"] else (True,)


def _instructed(pipe: Any, _: Mapping[str, Any]) -> Branches:
    return (True, False, False) if pipe.do_classifier_free_guidance else (True,)


def _perturbed(pipe: Any, variables: Mapping[str, Any]) -> Branches:
    branches = _guided(pipe, variables)
    return (*branches, True) if pipe.do_perturbed_attention_guidance else branches


# Read from diffusers 0.42, class by class. Only pipelines that show at every call whether they use guidance.
_LAYOUTS: dict[Layout, str] = {
    _guided: """
        StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
        StableDiffusionDepth2ImgPipeline StableDiffusionNexusPipeline
        StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline
        StableDiffusionControlNetInpaintPipeline
        StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetImg2ImgPipeline
        StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetUnionPipeline
        StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
        StableDiffusionAdapterPipeline StableDiffusionXLAdapterPipeline StableDiffusionXLNexusPipeline
        KolorsPipeline KolorsImg2ImgPipeline
    """,
    guided_by_variable: "StableDiffusionSAGPipeline",
    _instructed: "StableDiffusionInstructPix2PixPipeline",
    _perturbed: """
        StableDiffusionPAGPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline
        StableDiffusionXLPAGPipeline StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline
        StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPAGInpaintPipeline
        StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
        KolorsPAGPipeline
    """,
    _single: "LatentConsistencyModelPipeline LatentConsistencyModelImg2ImgPipeline",
}
KNOWN_PIPELINES = {name: layout for layout, names in _LAYOUTS.items() for name in names.split()}


def known_layout(pipe: Any) -> Layout | None:
    """Return the function that gives a pipeline's branches; None for an unknown pipeline or for None.

    The class whose `__call__` runs decides. A subclass that inherits `__call__`, or only calls it, has the
    same layout; a subclass with its own denoising loop is unknown.
    """
    for cls in type(pipe).__mro__:
        call = vars(cls).get("__call__")
        if call is None:
            continue
        if cls.__module__.split(".")[0] in ("diffusers", "nexus_adapters"):
            return KNOWN_PIPELINES.get(cls.__name__)
        if not _only_calls_super(call):
            return None
    return None


def is_stock(loop: str) -> bool:
    """Return whether a call comes from diffusers' own loop and not from code of a subclass around it."""
    return loop.split(".")[0] in ("diffusers", "")


def _only_calls_super(call: Any) -> bool:
    """Return whether a method only calls `super().__call__` and does not use the denoiser itself."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    if code is None:
        return False
    names = set(_names(code))
    return {"super", "__call__"} <= names and "unet" not in names


def _names(code: CodeType) -> Iterator[str]:
    """Yield all names that a function uses, including in nested functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
