"""Find which pipeline is calling the denoiser, and whether it denoises a crop, which the hook cannot see.

Pipelines may share a denoiser and its controls, but each has its own layout of the batch; and nothing in a
call shows that its latents are a part of the image. Neither is passed to the denoiser, so both are looked up
in the frame of the running `__call__`. Otherwise, a wrong layout or a condition in the wrong place would go
unnoticed.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

from nexus_adapters.bases.base import Base, CallingPipeline
from nexus_adapters.bases.families import inner
from nexus_adapters.errors import InvalidArgument

NO_PIPELINE = CallingPipeline(None, {})


def calling_pipeline(base: Base, denoiser: nn.Module) -> CallingPipeline:
    """Return the pipeline whose `__call__` is running in this thread with this denoiser, if any.

    Raises:
        InvalidArgument: if it denoises tiles.
    """
    calling = _innermost_call(base, denoiser)
    base.check_pipeline(calling.pipe)
    return calling


def check_crop(calling: CallingPipeline, crop: tuple[int, int, int, int] | None) -> tuple[int, int] | None:
    """Return (width, height) of the image if the pipeline denoises a crop of it, else None.

    Raises:
        InvalidArgument: if it denoises a crop and the control's `crop` is missing or different.
    """
    padding = calling.variables.get("padding_mask_crop")
    if padding is None:
        return None
    if crop is None:
        raise InvalidArgument(
            "padding_mask_crop",
            "None, or a control with crop=(left, top, right, bottom)",
            padding,
            "A control cannot see which part of the image the pipeline denoises",
        )
    denoised, mask = calling.variables.get("crops_coords"), calling.variables.get("mask_image")
    if denoised is not None and tuple(denoised) != crop:
        raise InvalidArgument("crop", f"{tuple(denoised)}, the part of the image that is denoised", crop)
    size = getattr(mask, "size", None)
    return size if isinstance(size, tuple) else None


def is_calling(pipe: Any, base: Base, denoiser: nn.Module) -> bool:
    """Return whether this thread is using the denoiser in this pipeline's `__call__`."""
    return pipe is not None and _innermost_call(base, denoiser).pipe is pipe


def _innermost_call(base: Base, denoiser: nn.Module) -> CallingPipeline:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            variables = frame.f_locals
            pipe = variables.get("self")
            is_module = isinstance(pipe, nn.Module)  # a wrapped denoiser's own call
            # The denoiser may have been wrapped since: compiled, or by PEFT.
            if not is_module and inner(getattr(pipe, base.denoiser_name, None)) is inner(denoiser):
                loop = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"
                return CallingPipeline(pipe, variables, loop)
        frame = frame.f_back
    return NO_PIPELINE
