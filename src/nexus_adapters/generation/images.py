"""Prepare the controls of a request, and generate its images one by one."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nexus_adapters.errors import expect, mentions, renamed, warn_caller
from nexus_adapters.generation.maps import ReadControl, check_size, read_control, structure_map
from nexus_adapters.generation.models import LoadedAdapter, Model, build_scheduler
from nexus_adapters.generation.requests import GenerateRequest, expect_area
from nexus_adapters.generation.settings import settings_of
from nexus_adapters.generation.steps import OnStep, observed

if TYPE_CHECKING:
    from PIL import Image

    from nexus_adapters.injection import Control


@dataclass(frozen=True)
class OwnPipelineControl:
    """A map for an adapter that has its own pipeline, such as a ControlNet."""

    adapter: Any
    condition: "Image.Image"
    scale: float


@dataclass(frozen=True)
class Prepared:
    """A request with its controls built, ready to generate images of any seed.

    Attributes:
        controls: the controls, one for each map.
        size: (width, height) in pixels.
        settings: the settings, all but the seed.
        scheduler: the scheduler.
    """

    controls: "tuple[Control | OwnPipelineControl, ...]"
    size: tuple[int, int]
    settings: dict[str, Any]
    scheduler: Any

    def settings_of(self, seed: int) -> dict[str, Any]:
        """Return the settings of the image of this seed."""
        return self.settings | {"seed": seed}


def prepare(request: GenerateRequest, model: Model, read: Sequence[ReadControl] | None = None) -> Prepared:
    """Build the controls, the scheduler and the settings of a request.

    Args:
        request: the request.
        model: the base, with an adapter for each control.
        read: the controls with their files, if the caller has read them; by default, they are read here.

    Raises:
        InvalidArgument: named after an argument.
    """
    from nexus_adapters.injection.condition import image_size

    read = [read_control(control) for control in request.controls] if read is None else read
    scheduler = build_scheduler(model.scheduler, request.scheduler, request.steps)
    first = read[0]
    height, width = image_size(
        (first.source.height, first.source.width),
        request.height,
        request.width,
        model.native_size,
        model.pipe.vae_scale_factor,
        first.request.given.argument,
    )
    size = width, height
    expect_area(*size)
    pairs = zip(read, model.adapters, strict=True)
    controls = tuple(build_control(each, loaded, size) for each, loaded in pairs)
    decided = replace(request, controls=tuple(each.request for each in read))
    return Prepared(controls, size, settings_of(decided, model, size), scheduler)


def check_scales(request: GenerateRequest) -> None:
    """Warn of negative scales."""
    if any(control.scale < 0 for control in request.controls):
        warn_caller("scale: a negative scale subtracts the adapter's features; 0 turns the adapter off")


def build_control(
    read: ReadControl, loaded: LoadedAdapter, size: tuple[int, int]
) -> "Control | OwnPipelineControl":
    """Build one control for an image of (width, height). `InvalidArgument` names the argument."""
    from nexus_adapters.conditions import EXTRACTORS
    from nexus_adapters.conditions.resize import fit_map
    from nexus_adapters.injection import Control
    from nexus_adapters.methods import method_of

    request = read.request
    check_size(request, read.source, *size)
    if read.mask is not None:
        check_size(request, read.mask, *size, "mask")
    condition, kind = structure_map(request, read.source, size), EXTRACTORS[request.condition_name].kind
    if method_of(loaded.adapter).attaches:
        with renamed({"condition": request.given.argument}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "condition: ")  # reading the map has already warned
            settings = request.settings() | {"kind": kind, "invert": False}
            return Control(loaded.adapter, condition, mask=read.mask, **settings)
    fitted = fit_map(condition, size, kind, request.resize_mode)
    return OwnPipelineControl(loaded.adapter, fitted, request.scale)


def generate_image(
    model: Model, prepared: Prepared, seed: int, on_step: OnStep | None = None
) -> "Image.Image":
    """Generate one image.

    Images are not batched, so that each can be generated again from its own seed, bit for bit.

    Args:
        model: the model that the request was prepared for.
        prepared: the prepared request.
        seed: the seed of the noise.
        on_step: called after each denoising step; it does not change the image. To cancel, raise an exception
            in it: the model is left as it was.

    Raises:
        MemoryError: if the device runs out of memory.
        InvalidArgument: if the image has values that are not finite.
    """
    import torch

    from nexus_adapters.bases.families import check_finite

    settings = prepared.settings
    model.pipe.scheduler = prepared.scheduler
    # Always on the CPU, so that a seed gives the same noise on every device.
    generator = torch.Generator().manual_seed(seed)
    width, height = prepared.size
    try:
        with (
            observed(model.pipe, on_step) as reporting,
            _controlled(model.pipe, prepared.controls) as call,
        ):
            output = call(
                **reporting,
                prompt=settings["prompt"],
                **_negative(model.pipe, settings["negative"]),
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                width=width,
                height=height,
                generator=generator,
                output_type="np",  # values that are not finite would be lost in 8-bit pixels
            )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not mentions(error, ("can't allocate memory",)):
            raise
        raise MemoryError(
            f"not enough memory on {settings['device']} for {width}x{height}; try a smaller `width` and "
            "`height`"
        ) from error
    with renamed({"images": f"image of seed {seed}"}):
        check_finite(output.images)
    image: Image.Image = model.pipe.numpy_to_pil(output.images)[0]
    return image


def _negative(pipe: Any, prompt: str) -> dict[str, str]:
    """Return the keyword argument for the negative prompt, if the pipeline takes one."""
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        return {"negative_prompt": prompt}
    kind = type(pipe).__name__
    expect(prompt == "", "negative", f"no value: {kind} has no negative prompt", repr(prompt))
    return {}


@contextmanager
def _controlled(
    pipe: Any, controls: "Sequence[Control | OwnPipelineControl]"
) -> Iterator[Callable[..., Any]]:
    """Yield the pipeline, or what is called in its place, with all controls applied."""
    from nexus_adapters.injection import attach
    from nexus_adapters.methods import GenerationSettings, method_of

    own = [control for control in controls if isinstance(control, OwnPipelineControl)]
    if not own:
        with attach(pipe, *controls):
            yield pipe
        return
    (control,) = own
    settings = GenerationSettings(scale=control.scale)
    with method_of(control.adapter).generating(pipe, control.adapter, [control.condition], settings) as call:
        yield call
