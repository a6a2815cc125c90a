"""From requests to images: adapters, pipeline, LoRA, structure maps, controls. Slow imports are lazy."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli.control_requests import ACTING, ControlRequest, MapSource
from nexus_adapters.cli.extract import running_extractor
from nexus_adapters.cli.generate_requests import SCHEDULERS, LoraRequest
from nexus_adapters.errors import InvalidArgument, expect, mentions, one_line, renamed, warn_caller
from nexus_adapters.files import file_sha256, files_sha256, without_folder
from nexus_adapters.packages import check_packages

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.bases.loading import BaseSource
    from nexus_adapters.injection import Control


# Adapters and the pipeline.


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, its name in the settings, and the SHA-256 of its tensors."""

    adapter: Any
    name: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """A stock pipeline, an adapter for each control, and their origin, as recorded in the settings."""

    pipe: Any
    base: str
    base_unet_sha256: str
    adapters: Sequence[LoadedAdapter]
    native_size: int


def find_adapters(controls: Sequence[ControlRequest], base: str) -> list["Saved"]:
    """Find the saved adapter of each control, without slow imports."""
    from nexus_adapters.adapter.saved import find_saved

    return [find_saved(control.adapter, control.condition_name, base) for control in controls]


def check_methods(controls: Sequence[ControlRequest], adapters: Sequence["Saved"]) -> None:
    """Raise `InvalidArgument` for options and maps that an adapter with its own pipeline does not support."""
    from nexus_adapters.methods import method_for

    for control, saved in zip(controls, adapters, strict=True):
        method = method_for(saved)
        if method.attaches:
            continue
        label = f"a {method.label}"
        maps = f"{len(controls)} maps with '{saved.source}'"
        expect(len(controls) == 1, "--adapter", f"a single map with {label}", maps)
        for name in ACTING:
            value = getattr(control, name)
            is_read = name in method.settings or value == getattr(ControlRequest, name)
            expect(is_read, name, f"no value with {label}, where it has no effect", value)


def load_model(source: "BaseSource", saved: Sequence["Saved"], torch_dtype: "torch.dtype") -> Model:
    """Load the pipeline and the adapters on the CPU. Adapters are checked before the base is loaded."""
    from nexus_adapters.bases.loading import denoiser_files, load_base, open_base
    from nexus_adapters.methods import load_saved, method_for, method_of

    base = open_base(source)
    for each in saved:
        method_for(each).check_saved(each, base)
    loaded: dict[tuple[Path, ...], LoadedAdapter] = {}
    for each in saved:
        if each.files not in loaded:
            adapter = load_saved(each, torch_dtype)
            method_of(adapter).check_fit(adapter, base)
            loaded[each.files] = LoadedAdapter(adapter, _name(each, source.path), each.sha256())
    pipe = load_base(source, dtype=torch_dtype)
    sha256 = files_sha256(denoiser_files(source))
    return Model(pipe, source.path, sha256, [loaded[each.files] for each in saved], base.native_size())


def _name(saved: "Saved", base: str) -> str:
    """Return the adapter's name in the settings; embedded adapters are prefixed by their base."""
    bundle = BUNDLED.get(base)
    return f"{base} {saved.source}" if bundle and bundle.has_adapter(saved.source) else saved.source


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Replace the pipeline's scheduler, keeping its noise schedule. `None` changes nothing."""
    if name is None:
        return
    import diffusers

    kind, changes = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)


def check_schedule(scheduler: Any, steps: int) -> None:
    """Raise `InvalidArgument` for a number of steps that the scheduler does not support.

    The error names the nearest supported number.
    """
    if _takes_steps(scheduler, steps):
        return
    by_distance = sorted(range(1, scheduler.config.num_train_timesteps + 1), key=lambda n: abs(n - steps))
    nearest = next((n for n in by_distance if _takes_steps(scheduler, n)), None)
    bound = "" if nearest is None else f", {'at least' if nearest > steps else 'at most'} {nearest}"
    expected = f"a number of steps that {type(scheduler).__name__} supports with the base's schedule{bound}"
    raise InvalidArgument("--steps", expected, steps)


def _takes_steps(scheduler: Any, steps: int) -> bool:
    """Return whether the steps begin within the training timesteps, and no step has length zero."""
    try:
        scheduler.set_timesteps(steps)
    except Exception:  # PNDM and LCM raise whatever their arithmetic raises
        return False
    timesteps, trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    is_tabled = hasattr(scheduler, "alphas_cumprod")  # flow matching may begin at num_train_timesteps
    begins_within = not is_tabled or float(timesteps[0]) <= trained - 1
    if not begins_within or "solver_order" not in scheduler.config:
        return begins_within
    return len(scheduler.sigmas.unique()) == len(scheduler.sigmas)  # solvers divide by the step length


# LoRA.


def check_loras(loras: Sequence[LoraRequest]) -> None:
    """Check, before anything is loaded, that peft is installed and the files exist."""
    if not loras:
        return
    check_packages("lora", "peft")
    for lora in loras:
        expect(lora.path != "", "--lora", "a file, a folder or a Hub id", "an empty string")
        is_there = Path(lora.path).exists() or "/" in lora.path
        missing = f"'{lora.path}', which does not exist"
        expect(is_there, "--lora", "a file, a folder or a Hub id", missing)


def load_loras(pipe: Any, loras: Sequence[LoraRequest]) -> None:
    """Load each LoRA under its own name, with its scale. `InvalidArgument` names one that fails to load."""
    names = [f"lora{place}" for place in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        given = Path(lora.path)
        source = (str(given.parent), {"weight_name": given.name}) if given.is_file() else (lora.path, {})
        expected = "LoRA weights for the base"
        try:
            pipe.load_lora_weights(source[0], adapter_name=name, **source[1])
        except Exception as error:  # diffusers, peft, safetensors and the Hub raise errors of many kinds
            received = f"'{lora.path}' ({type(error).__name__}: {one_line(error)})"
            raise InvalidArgument("--lora", expected, received) from error
        is_used = any(name in found for found in pipe.get_list_adapters().values())
        expect(is_used, "--lora", expected, f"'{lora.path}'")
    if names:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def lora_settings(loras: Sequence[LoraRequest]) -> list[dict[str, Any]]:
    """Return the record of each LoRA: its name, scale and, for a file, SHA-256."""
    return [
        {
            "path": without_folder(lora.path),
            "scale": lora.scale,
            "sha256": file_sha256(Path(lora.path)) if Path(lora.path).is_file() else None,
        }
        for lora in loras
    ]


# Structure maps.

SMALLEST_PX = 8  # one latent
_SMALLEST_FOR_MODELS_PX = 64  # smallest side that models for depth and segmentation take


def extractor_options(control: ControlRequest) -> dict[str, object]:
    """Return all options for extracting the map, or for reading a given map."""
    from nexus_adapters.conditions import EXTRACTORS

    name = control.condition_name
    if isinstance(control.given, MapSource):
        return control.given.reading.values(name)
    return EXTRACTORS[name].defaults() | control.given.extractor.values(name)


def read_source(control: ControlRequest) -> tuple["Image.Image", ControlRequest]:
    """Read and check the photo or the map, and return it with the request.

    The returned request says whether the map is inverted; a map extracted from a photo is inverted only on
    request. `InvalidArgument` names the option.
    """
    from nexus_adapters.conditions import EXTRACTORS, extract, load_as_stored, load_image
    from nexus_adapters.conditions.maps import read_and_invert

    name, given = control.condition_name, control.given
    known = ", ".join(sorted(EXTRACTORS))
    expect(name in EXTRACTORS, "--condition", f"one of {known}", repr(name))
    load = load_as_stored if isinstance(given, MapSource) else load_image
    image = load(given.file, control.max_megapixels, argument=given.option)
    size = f"{image.width}x{image.height}"
    expect(min(image.size) >= SMALLEST_PX, given.option, f"at least {SMALLEST_PX} pixels a side", size)
    if isinstance(given, MapSource):
        options = given.reading.values(name)
        with renamed(lambda argument: f"--option {argument}" if argument in options else argument):
            image, inverted = read_and_invert(
                image, EXTRACTORS[name].kind, invert=control.invert, name=given.option, **options
            )
        return image, replace(control, invert=inverted)
    # Run the extractor on a small image before the base is loaded, so that it checks its options.
    side = _SMALLEST_FOR_MODELS_PX if EXTRACTORS[name].model else SMALLEST_PX
    options = given.extractor.values(name)
    with running_extractor(name, options):
        extract(name, image.resize((side, side)), **options)
    return image, replace(control, invert=bool(control.invert))


def read_mask(control: ControlRequest) -> "Image.Image | None":
    """Read the mask of `--mask` as a grayscale image; transparent parts become black (no control)."""
    from PIL import Image

    from nexus_adapters.conditions import load_as_stored
    from nexus_adapters.conditions.images import GREY_16_BIT, is_transparent, to_rgb

    if control.mask is None:
        return None
    mask = load_as_stored(control.mask, control.max_megapixels, argument="--mask")
    if is_transparent(mask) and mask.mode not in GREY_16_BIT:
        warn_caller("--mask: transparent parts are read as black: the control does not act there")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    with renamed({"image": "--mask"}):
        return to_rgb(mask).convert("L")


def check_size(
    control: ControlRequest,
    source: "Image.Image",
    width: int | None,
    height: int | None,
    option: str = "",
) -> None:
    """Raise `InvalidArgument` if the source's aspect ratio differs and the control has no `resize_mode`.

    Args:
        control: the control.
        source: its photo, map or mask.
        width: of the generated image, in pixels.
        height: of the generated image, in pixels.
        option: the option that names the file of `source`; "" for that of the control's photo or map.
    """
    from nexus_adapters.injection.condition import check_aspect

    if width is not None and height is not None and control.resize_mode is None:
        name = option or control.given.option
        check_aspect(source.height, source.width, height, width, name, "--resize-mode")


def structure_map(control: ControlRequest, source: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """Return the given map, or extract it from the photo.

    A photo is first resized to `size`, which is (width, height), so that lines stay sharp.
    """
    from PIL import Image

    from nexus_adapters.conditions import EXTRACTORS, extract, invert
    from nexus_adapters.conditions.resize import padded, placement

    name, kind, mode = control.condition_name, EXTRACTORS[control.condition_name].kind, control.resize_mode
    if isinstance(control.given, MapSource):
        return source
    placed = placement((0, 0, *source.size), size, mode)
    resized = source.resize(placed.size, Image.Resampling.LANCZOS, box=placed.box)
    options = control.given.extractor.values(name)
    with running_extractor(name, options):
        condition = extract(name, resized, **options)
    if control.invert:
        condition = invert(condition)
    return padded(condition, placed, size, kind)


# Controls and images.


@dataclass(frozen=True)
class OwnPipelineControl:
    """A map for an adapter that has its own pipeline, such as a ControlNet."""

    adapter: Any
    condition: "Image.Image"
    scale: float


def build_control(
    control: ControlRequest,
    loaded: LoadedAdapter,
    source: "Image.Image",
    mask: "Image.Image | None",
    size: tuple[int, int],
) -> "Control | OwnPipelineControl":
    """Build the control of one map for an image of (width, height). `InvalidArgument` names the option."""
    from nexus_adapters.conditions import EXTRACTORS
    from nexus_adapters.conditions.resize import fit_map
    from nexus_adapters.injection import Control
    from nexus_adapters.methods import method_of

    check_size(control, source, *size)
    if mask is not None:
        check_size(control, mask, *size, "--mask")
    condition, kind = structure_map(control, source, size), EXTRACTORS[control.condition_name].kind
    if method_of(loaded.adapter).attaches:
        with renamed({"condition": control.given.option, "mask": "--mask"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "condition: ")  # reading the map has already warned
            settings = control.settings() | {"kind": kind, "invert": False}
            return Control(loaded.adapter, condition, mask=mask, **settings)
    fitted = fit_map(condition, size, kind, control.resize_mode)
    return OwnPipelineControl(loaded.adapter, fitted, control.scale)


def generate_image(
    model: Model, controls: Sequence["Control | OwnPipelineControl"], settings: Mapping[str, Any]
) -> "Image.Image":
    """Generate one image.

    Images are not batched, so that each can be generated again from its own seed, bit for bit.

    Raises:
        MemoryError: if the device runs out of memory.
        InvalidArgument: if the image has values that are not finite.
    """
    import torch

    from nexus_adapters.bases.families import check_finite

    # Always on the CPU, so that a seed gives the same noise on every device.
    generator = torch.Generator().manual_seed(settings["seed"])
    try:
        with _controlled(model.pipe, controls) as call:
            output = call(
                prompt=settings["prompt"],
                **_negative(model.pipe, settings["negative"]),
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                width=settings["width"],
                height=settings["height"],
                generator=generator,
                output_type="np",  # values that are not finite would be lost in 8-bit pixels
            )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not mentions(error, ("can't allocate memory",)):
            raise
        size, device = f"{settings['width']}x{settings['height']}", settings["device"]
        raise MemoryError(
            f"not enough memory on {device} for {size}; try a smaller --width and --height"
        ) from error
    with renamed({"images": f"image of seed {settings['seed']}"}):
        check_finite(output.images)
    image: Image.Image = model.pipe.numpy_to_pil(output.images)[0]
    return image


def _negative(pipe: Any, prompt: str) -> dict[str, str]:
    """Return the keyword argument for the negative prompt, if the pipeline takes one."""
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        return {"negative_prompt": prompt}
    kind = type(pipe).__name__
    expect(prompt == "", "--negative", f"no value: {kind} has no negative prompt", repr(prompt))
    return {}


@contextmanager
def _controlled(
    pipe: Any, controls: Sequence["Control | OwnPipelineControl"]
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
