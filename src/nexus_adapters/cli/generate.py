"""`nexus generate`: an image that follows a prompt and a structure map."""

import argparse
import inspect
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli.generate_requests import (
    DEFAULTS,
    check_numbers,
    check_size,
    declare,
    draw_condition,
    image_size,
    read_source,
    settings_of_control,
    source_argument,
    split_controls,
    used_options,
)
from nexus_adapters.cli.generation import (
    LoadedAdapter,
    Model,
    check_loras,
    find_adapters,
    load_loras,
    load_model,
    lora_settings,
    set_scheduler,
    source_of,
)
from nexus_adapters.cli.options import choose_device, choose_dtype
from nexus_adapters.errors import expect, mentions, renamed
from nexus_adapters.files import file_sha256

if TYPE_CHECKING:
    from PIL import Image

    from nexus_adapters.adapter.saved import Saved
    from nexus_adapters.injection import Control

# Arguments of functions whose names differ from those of the options.
TYPED = {"unet": "--base", "pipe_or_denoiser": "--base", "scheduler.prediction_type": "--base"}
_GUIDANCE = 7.5  # of a given base, as in the stock pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus generate`."""
    declare(parser)


def run(args: argparse.Namespace) -> int:
    """Check, load, generate one image after the other, and print where each is."""
    check_numbers(args)
    controls = split_controls(args)
    named = [(control.adapter, control.condition) for control in controls]
    adapters = find_adapters(args.base, named)
    check_loras(args.lora)
    files = output_files(args.out, args.num, args.force)
    sources = [read_source(control) for control in controls]
    masks = [read_mask(control) for control in controls]

    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    device = choose_device(args.device)
    with library_logs_as_warnings():
        for control, source in zip(controls, sources, strict=True):
            check_size(control, source)
        check_methods(controls, adapters)
        dtype = choose_dtype(args.dtype, device)
        base = source_of(args.base, args.base_config, args.prediction_type)
        model = load_model(base, adapters, dtype)
        load_loras(model.pipe, args.lora, args.lora_scale)
        if device != "cpu":  # where all is; diffusers would warn that float16 cannot run there, but it does
            model.pipe.to(device)
            for each in model.adapters:
                each.adapter.to(device)
        set_scheduler(model.pipe, args.scheduler)
        check_schedule(model.pipe.scheduler, args.steps)
        factor = model.pipe.vae_scale_factor
        size = image_size(sources[0].size, args.width, args.height, model.native_size, factor)
        attached = [
            build_control(control, loaded, draw_condition(control, source, size), mask)
            for control, loaded, source, mask in zip(controls, model.adapters, sources, masks, strict=True)
        ]
        settings = settings_of(args, controls, model, size)
        for index, file in enumerate(files):
            model.pipe.set_progress_bar_config(desc=file.name)
            own = settings | {"seed": args.seed + index}
            save(file, generate(model, attached, own), own, args.force)
    return 0


def check_methods(controls: Sequence[argparse.Namespace], adapters: Sequence["Saved"]) -> None:
    """`InvalidArgument` for options and maps that an adapter with a pipeline of its own does not take."""
    from nexus_adapters.methods import method_for

    for control, saved in zip(controls, adapters, strict=True):
        method = method_for(saved)
        if method.attaches:
            continue
        label = f"a {method.label}"
        maps = f"{len(controls)} maps with '{saved.source}'"
        expect(len(controls) == 1, "--adapter", f"one map alone with {label}", maps)
        given = {name: getattr(control, name) for name in DEFAULTS if name not in ("condition", "adapter")}
        for name, value in given.items():
            is_read = name in method.settings or value == DEFAULTS[name]
            expect(is_read, name, f"no value with {label}, where it has no effect", value)


def read_mask(control: argparse.Namespace) -> "Image.Image | None":
    """The mask of `--mask`, as grey."""
    from nexus_adapters.conditions import load_image

    if control.mask is None:
        return None
    return load_image(control.mask, control.max_megapixels, argument="--mask").convert("L")


def build_control(
    args: argparse.Namespace, loaded: LoadedAdapter, condition: "Image.Image", mask: "Image.Image | None"
) -> "Control | OwnPipelineControl":
    """The control of one map. `InvalidArgument` names the option."""
    from nexus_adapters.injection import Control
    from nexus_adapters.methods import method_of

    settings = settings_of_control(args)
    if method_of(loaded.adapter).attaches:
        with renamed({"condition": source_argument(args)}):
            return Control(loaded.adapter, condition, mask=mask, **settings)
    return OwnPipelineControl(loaded.adapter, condition, settings["scale"])


@dataclass(frozen=True)
class OwnPipelineControl:
    """A map for an adapter that has a pipeline of its own, such as a ControlNet."""

    adapter: Any
    condition: "Image.Image"
    scale: float


def check_schedule(scheduler: Any, steps: int) -> None:
    """`InvalidArgument` where so many steps would begin before the noisiest timestep of the training."""
    scheduler.set_timesteps(steps)
    trained = scheduler.config.num_train_timesteps
    is_tabled = hasattr(scheduler, "alphas_cumprod")  # flow matching begins at the number itself
    expect(
        not is_tabled or float(scheduler.timesteps[0]) <= trained - 1,
        "--steps",
        f"fewer than the {trained} steps of the base's schedule",
        steps,
    )


def output_files(out: str, num: int, force: bool) -> list[Path]:
    """`out`, or for several images FILE-0001.png and so on; each checked."""
    from nexus_adapters.cli.options import check_output

    file = check_output(out, ".png", force or num > 1)
    if num == 1:
        return [file]
    files = [file.with_name(f"{file.stem}-{index:04d}{file.suffix}") for index in range(1, num + 1)]
    return [check_output(each, ".png", force) for each in files]


def settings_of(
    args: argparse.Namespace, controls: Sequence[argparse.Namespace], model: Model, size: tuple[int, int]
) -> dict[str, Any]:
    """All that makes an image again, but its seed, which differs between the images of one call.

    Of several controls the first one's stand as those of a single one do, the others' in "more_controls".
    """
    from nexus_adapters.evaluation.provenance import versions

    bundle = BUNDLED.get(model.base)
    default_guidance = _GUIDANCE if bundle is None else bundle.guidance_scale
    each = [of_control(*pair) for pair in zip(controls, model.adapters, strict=True)]
    return {
        "version": __version__,
        "command": "generate",
        **{name: getattr(args, name) for name in ("prompt", "negative", "steps", "scheduler")},
        "guidance": default_guidance if args.guidance is None else args.guidance,
        **each[0],
        **({"more_controls": each[1:]} if each[1:] else {}),
        "width": size[0],
        "height": size[1],
        "base": model.base,
        "base_config": args.base_config,
        "prediction_type": args.prediction_type,
        "base_unet_sha256": model.base_unet_sha256,
        "loras": lora_settings(args.lora, args.lora_scale),
        "device": model.pipe.device.type,
        "dtype": str(model.pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def of_control(args: argparse.Namespace, loaded: LoadedAdapter) -> dict[str, Any]:
    """A control's settings."""
    file = Path(args.map if args.image is None else args.image)
    mask = None if args.mask is None else Path(args.mask)
    return {
        **settings_of_control(args),
        "balance": args.balance,
        "condition": args.condition,
        "source": source_argument(args).lstrip("-"),
        "source_file": str(file),
        "source_sha256": file_sha256(file),
        "options": used_options(args),
        "inverted": args.invert,
        "mask": None if mask is None else str(mask),
        "mask_sha256": None if mask is None else file_sha256(mask),
        "adapter": loaded.name,
        "adapter_sha256": loaded.sha256,
    }


def generate(
    model: Model, controls: Sequence["Control | OwnPipelineControl"], settings: Mapping[str, Any]
) -> "Image.Image":
    """One image. Never in batches: with its own seed each can be made again by itself, bit for bit.

    MemoryError where there is not enough of it, on whichever device.
    """
    import torch

    # On the CPU on every device, so that a seed means the same noise everywhere.
    generator = torch.Generator().manual_seed(settings["seed"])
    try:
        with controlled(model.pipe, controls) as call:
            output = call(
                prompt=settings["prompt"],
                **_negative(model.pipe, settings["negative"]),
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                width=settings["width"],
                height=settings["height"],
                generator=generator,
            )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not mentions(error, ("can't allocate memory",)):
            raise
        size, device = f"{settings['width']}x{settings['height']}", settings["device"]
        raise MemoryError(
            f"not enough memory on {device} for {size}; try a smaller --width and --height"
        ) from error
    image: Image.Image = output.images[0]
    return image


def _negative(pipe: Any, prompt: str) -> dict[str, str]:
    """The argument of a pipeline that takes a negative prompt."""
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        return {"negative_prompt": prompt}
    expect(
        prompt == "", "--negative", f"no value for a {type(pipe).__name__}, which takes none", repr(prompt)
    )
    return {}


@contextmanager
def controlled(pipe: Any, controls: Sequence["Control | OwnPipelineControl"]) -> Iterator[Callable[..., Any]]:
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
    with method_of(control.adapter).drawing(pipe, control.adapter, [control.condition], settings) as call:
        yield call


def save(file: Path, image: "Image.Image", settings: Mapping[str, Any], force: bool) -> None:
    """Write the image with its settings, and print where: next to a file that was written meanwhile."""
    from nexus_adapters.cli.options import save_png

    if file.exists() and not force:
        file = file.with_name(f"{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    save_png(file, image, settings, force)
    print(f"{file}: {image.width}x{image.height}, seed {settings['seed']}", flush=True)
