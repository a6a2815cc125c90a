"""From requests to images: adapters, pipeline, LoRA, structure maps, controls. Whatever is slow is lazy."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli.control_requests import ACTING, ControlRequest, MapSource
from nexus_adapters.cli.extract import running_extractor
from nexus_adapters.cli.generate_requests import SCHEDULERS, LoraRequest
from nexus_adapters.errors import InvalidArgument, expect, mentions, one_line, renamed, warn_caller
from nexus_adapters.files import file_sha256, files_sha256, without_folder

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.bases.loading import BaseSource
    from nexus_adapters.injection import Control


# Adapters and the pipeline.


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter, and its name in the settings. `sha256`: of its tensors."""

    adapter: Any
    name: str
    sha256: str


@dataclass(frozen=True)
class Model:
    """A stock pipeline, an adapter for each control, and what they were made of, as settings record it."""

    pipe: Any
    base: str
    base_unet_sha256: str
    adapters: Sequence[LoadedAdapter]
    native_size: int


def find_adapters(controls: Sequence[ControlRequest], base: str) -> list["Saved"]:
    """The saved adapter of each control; nothing slow is imported for it."""
    from nexus_adapters.adapter.saved import find_saved

    return [find_saved(control.adapter, control.condition_name, base) for control in controls]


def check_methods(controls: Sequence[ControlRequest], adapters: Sequence["Saved"]) -> None:
    """`InvalidArgument` for options and maps that an adapter with a pipeline of its own does not take."""
    from nexus_adapters.methods import method_for

    for control, saved in zip(controls, adapters, strict=True):
        method = method_for(saved)
        if method.attaches:
            continue
        label = f"a {method.label}"
        maps = f"{len(controls)} maps with '{saved.source}'"
        expect(len(controls) == 1, "--adapter", f"one map alone with {label}", maps)
        for name in ACTING:
            value = getattr(control, name)
            is_read = name in method.settings or value == getattr(ControlRequest, name)
            expect(is_read, name, f"no value with {label}, where it has no effect", value)


def load_model(source: "BaseSource", saved: Sequence["Saved"], torch_dtype: "torch.dtype") -> Model:
    """The pipeline and the adapters on the CPU; each adapter is loaded once, and checked before the base."""
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
    """What settings call an adapter: with its base, where it is one of the package's."""
    bundle = BUNDLED.get(base)
    return f"{base} {saved.source}" if bundle and bundle.has_adapter(saved.source) else saved.source


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Replace a pipeline's scheduler by the one of this name, with the same noise schedule; None keeps it."""
    if name is None:
        return
    import diffusers

    kind, changes = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **changes)


def check_schedule(scheduler: Any, steps: int) -> None:
    """`InvalidArgument` for a number of steps that the scheduler cannot take; it names the nearest it can."""
    if _takes_steps(scheduler, steps):
        return
    by_distance = sorted(range(1, scheduler.config.num_train_timesteps + 1), key=lambda n: abs(n - steps))
    nearest = next((n for n in by_distance if _takes_steps(scheduler, n)), None)
    bound = "" if nearest is None else f", {'at least' if nearest > steps else 'at most'} {nearest}"
    expected = f"a number of steps that the {type(scheduler).__name__} takes with the base's schedule{bound}"
    raise InvalidArgument("--steps", expected, steps)


def _takes_steps(scheduler: Any, steps: int) -> bool:
    """Whether its steps begin within the training's timesteps, and have a length where it counts."""
    try:
        scheduler.set_timesteps(steps)
    except Exception:  # PNDM and LCM fail in whatever way their arithmetic does
        return False
    timesteps, trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    is_tabled = hasattr(scheduler, "alphas_cumprod")  # flow matching begins at the number itself
    begins_within = not is_tabled or float(timesteps[0]) <= trained - 1
    if not begins_within or "solver_order" not in scheduler.config:
        return begins_within
    return len(scheduler.sigmas.unique()) == len(scheduler.sigmas)  # they divide by the length of a step


# LoRA.


def check_loras(loras: Sequence[LoraRequest]) -> None:
    """Before anything is loaded: check that peft is installed and the files exist."""
    if not loras:
        return
    has_peft = find_spec("peft") is not None
    hint = "Run pip install 'nexus-adapters[lora]'"
    expect(has_peft, "--lora", "an installation with peft", "none", hint)
    for lora in loras:
        expect(lora.path != "", "--lora", "a file, a folder or a Hub id", "an empty text")
        is_there = Path(lora.path).exists() or "/" in lora.path
        missing = f"'{lora.path}', which does not exist"
        expect(is_there, "--lora", "a file, a folder or a Hub id", missing)


def load_loras(pipe: Any, loras: Sequence[LoraRequest]) -> None:
    """Load each under a name of its own, with its scale. `InvalidArgument` names what cannot be loaded."""
    names = [f"lora{place}" for place in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        given = Path(lora.path)
        source = (str(given.parent), {"weight_name": given.name}) if given.is_file() else (lora.path, {})
        expected = "LoRA weights for the base"
        try:
            pipe.load_lora_weights(source[0], adapter_name=name, **source[1])
        except Exception as error:  # of any kind: diffusers, peft, safetensors and the Hub have their own
            received = f"'{lora.path}' ({type(error).__name__}: {one_line(error)})"
            raise InvalidArgument("--lora", expected, received) from error
        is_used = any(name in found for found in pipe.get_list_adapters().values())
        expect(is_used, "--lora", expected, f"'{lora.path}'")
    if names:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def lora_settings(loras: Sequence[LoraRequest]) -> list[dict[str, Any]]:
    """What was loaded, and how strong."""
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
_SMALLEST_FOR_MODELS_PX = 64  # that models for depth and segmentation take


def extractor_options(control: ControlRequest) -> dict[str, object]:
    """All options that the map is extracted with, or those that a given one is read with."""
    from nexus_adapters.conditions import EXTRACTORS

    name = control.condition_name
    if isinstance(control.given, MapSource):
        return control.given.reading.values(name)
    return EXTRACTORS[name].defaults() | control.given.extractor.values(name)


def read_source(control: ControlRequest) -> tuple["Image.Image", ControlRequest]:
    """The photo, or the map as its kind is read, after all checks. `InvalidArgument` names the option.

    Also the request with `invert` as it was decided: a photo's map is only inverted where it is asked for.
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
    # The extractor checks its own options: try it on a small image before the base is loaded.
    side = _SMALLEST_FOR_MODELS_PX if EXTRACTORS[name].model else SMALLEST_PX
    options = given.extractor.values(name)
    with running_extractor(name, options):
        extract(name, image.resize((side, side)), **options)
    return image, replace(control, invert=bool(control.invert))


def read_mask(control: ControlRequest) -> "Image.Image | None":
    """The mask of `--mask`, as grey: what is transparent is black, where the control does not act."""
    from PIL import Image

    from nexus_adapters.conditions import load_as_stored
    from nexus_adapters.conditions.images import GREY_16_BIT, is_transparent, to_rgb

    if control.mask is None:
        return None
    mask = load_as_stored(control.mask, control.max_megapixels, argument="--mask")
    if is_transparent(mask) and mask.mode not in GREY_16_BIT:
        warn_caller("--mask: transparent parts are black, where the control does not act")
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
    """`InvalidArgument` where `width` and `height` have another aspect ratio, and no mode fits it.

    `option`: what names the file of `source`; by default that of the control's photo or map.
    """
    from nexus_adapters.injection.condition import check_aspect

    if width is not None and height is not None and control.resize_mode is None:
        name = option or control.given.option
        check_aspect(source.height, source.width, height, width, name, "--resize-mode")


def structure_map(control: ControlRequest, source: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """The map as given, or of a photo that is resized to (width, height) first, so that lines stay sharp."""
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
    """A map for an adapter that has a pipeline of its own, such as a ControlNet."""

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
    """The control of one map, for an image of (width, height). `InvalidArgument` names the option."""
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
            warnings.filterwarnings("ignore", "condition: ")  # it is read already, with its warnings
            settings = control.settings() | {"kind": kind, "invert": False}
            return Control(loaded.adapter, condition, mask=mask, **settings)
    fitted = fit_map(condition, size, kind, control.resize_mode)
    return OwnPipelineControl(loaded.adapter, fitted, control.scale)


def generate_image(
    model: Model, controls: Sequence["Control | OwnPipelineControl"], settings: Mapping[str, Any]
) -> "Image.Image":
    """One image. Never in batches: with its own seed each can be made again by itself, bit for bit.

    MemoryError where there is not enough of it, on whichever device. InvalidArgument for an image that is not
    finite.
    """
    import torch

    from nexus_adapters.bases.families import check_finite

    # On the CPU on every device, so that a seed means the same noise everywhere.
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
                output_type="np",  # 8-bit pixels do not show what is not finite
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
    """The argument of a pipeline that takes a negative prompt."""
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        return {"negative_prompt": prompt}
    kind = type(pipe).__name__
    expect(prompt == "", "--negative", f"no value for a {kind}, which takes none", repr(prompt))
    return {}


@contextmanager
def _controlled(
    pipe: Any, controls: Sequence["Control | OwnPipelineControl"]
) -> Iterator[Callable[..., Any]]:
    """The pipeline, or what is called in its place, under all controls."""
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
