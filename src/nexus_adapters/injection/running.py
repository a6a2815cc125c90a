"""Which pipeline is calling the UNet, and whether it denoises a crop, which the hook cannot see.

Pipelines share a UNet and so its controls, but each has its own layout of the batch; and nothing in a call
tells that its latents are a part of the image. Neither is passed to the UNet: both are looked up in the frame
of the running `__call__`. The alternatives are a wrong layout, or a condition over the wrong part, silently.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

_TILED = ("StableDiffusionPanoramaPipeline",)


@dataclass(frozen=True)
class Running:
    """A pipeline's call that is going on: `pipe` is None where there is none; the variables of `__call__`."""

    pipe: DiffusionPipeline | None
    variables: Mapping[str, Any]

    def check_crop(self, crop: object) -> None:
        """ValueError where the pipeline denoises a crop and a control does not say which."""
        padding = self.variables.get("padding_mask_crop")
        if padding is not None and crop is None:
            raise ValueError(
                "padding_mask_crop: expected None, or a control with crop=(left, top, right, bottom), since "
                f"the UNet is not told which part it denoises; received {padding}"
            )


def running_pipeline(unet: nn.Module) -> Running:
    """The pipeline in whose `__call__` this thread is and whose UNet this is, if any.

    ValueError where it denoises tiles.
    """
    running = _innermost_call(unet)
    refuse_tiled(running.pipe)
    return running


def is_running(pipe: DiffusionPipeline | None, unet: nn.Module) -> bool:
    """Whether it is this pipeline's `__call__` in which this thread uses the UNet now."""
    return pipe is not None and _innermost_call(unet).pipe is pipe


def _innermost_call(unet: nn.Module) -> Running:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            variables = frame.f_locals
            pipe = variables.get("self")
            if isinstance(pipe, DiffusionPipeline) and getattr(pipe, "unet", None) is unet:
                return Running(pipe, variables)
        frame = frame.f_back
    return Running(None, {})


def refuse_tiled(pipe: DiffusionPipeline | None) -> None:
    """ValueError for pipelines that denoise tile by tile."""
    names = {cls.__name__ for cls in type(pipe).__mro__}
    if names.intersection(_TILED):
        raise ValueError(
            f"pipe_or_unet: expected a pipeline that denoises the whole image at once; received "
            f"{type(pipe).__name__}, whose tiles the condition cannot be matched to"
        )
