"""Which pipeline is calling the UNet, and whether it denoises a crop, which the hook cannot see.

Pipelines share a UNet and so its controls, but each has its own layout of the batch; and nothing in a call
tells that its latents are a part of the image. Neither is passed to the UNet: both are looked up in the frame
of the running `__call__`. The alternatives are a wrong layout, or a condition over the wrong part, silently.
"""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

_TILED = ("StableDiffusionPanoramaPipeline",)


def running_pipeline(unet: nn.Module) -> DiffusionPipeline | None:
    """The pipeline in whose `__call__` this thread is and whose UNet this is, if any.

    Raises:
        ValueError: where it runs with `padding_mask_crop`, or denoises tiles.
    """
    pipe, variables = _innermost_call(unet)
    refuse_tiled(pipe)
    _refuse_crop(variables.get("padding_mask_crop"))
    return pipe


def is_running(pipe: DiffusionPipeline | None, unet: nn.Module) -> bool:
    """Whether it is this pipeline's `__call__` in which this thread uses the UNet now."""
    return pipe is not None and _innermost_call(unet)[0] is pipe


def _innermost_call(unet: nn.Module) -> tuple[DiffusionPipeline | None, Mapping[str, Any]]:
    """The pipeline of `running_pipeline`, and the variables of its `__call__`."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            variables = frame.f_locals
            pipe = variables.get("self")
            if isinstance(pipe, DiffusionPipeline) and getattr(pipe, "unet", None) is unet:
                return pipe, variables
        frame = frame.f_back
    return None, {}


def refuse_tiled(pipe: DiffusionPipeline | None) -> None:
    """ValueError for pipelines that denoise tile by tile."""
    names = {cls.__name__ for cls in type(pipe).__mro__}
    if names.intersection(_TILED):
        raise ValueError(
            f"pipe_or_unet: expected a pipeline that denoises the whole image at once; received "
            f"{type(pipe).__name__}, whose tiles the condition cannot be matched to"
        )


def _refuse_crop(crop: object) -> None:
    if crop is not None:
        raise ValueError(
            f"padding_mask_crop: expected None while a control is attached, since the condition cannot be "
            f"matched to the crop; received {crop}"
        )
