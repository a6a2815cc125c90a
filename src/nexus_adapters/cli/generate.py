"""`nexus generate`: an image that follows a prompt and a structure map."""

import argparse
import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.cli.adapters import EMBEDDED, LoadedAdapter
from nexus_adapters.cli.checks import names_as_options
from nexus_adapters.cli.control_arguments import settings_of_control, split_controls
from nexus_adapters.cli.devices import choose_device, choose_dtype
from nexus_adapters.cli.generate_arguments import check_numbers, declare
from nexus_adapters.cli.loras import check_loras, load_loras, lora_settings
from nexus_adapters.cli.model import Model, check_model, load_model
from nexus_adapters.cli.schedulers import set_scheduler
from nexus_adapters.cli.structure import (
    check_size,
    draw_condition,
    image_size,
    read_source,
    source_argument,
    used_options,
)

if TYPE_CHECKING:
    from PIL import Image

    from nexus_adapters.injection import Control

_GUIDANCE = 7.5  # of a given base, as in the stock pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `nexus generate`."""
    declare(parser)


def run(args: argparse.Namespace) -> int:
    """Check, load, generate one image after the other, and say where each went."""
    check_numbers(args)
    controls = split_controls(args)
    check_model(args.base, args.base_config, [control.adapter for control in controls])
    check_loras(args.lora)
    files = output_files(args.out, args.num, args.force)
    sources = [read_source(control) for control in controls]
    masks = [read_mask(control) for control in controls]

    from nexus_adapters.cli.library_logs import library_logs_as_warnings

    device = choose_device(args.device)
    with library_logs_as_warnings():
        for control, source in zip(controls, sources, strict=True):
            check_size(control, source)
        names = [control.adapter for control in controls]
        dtype = choose_dtype(args.dtype, device)
        model = load_model(args.base, args.base_config, names, controls[0].condition, dtype)
        load_loras(model.pipe, args.lora, args.lora_scale)
        if device != "cpu":  # where it is; diffusers would warn that float16 cannot run there, but it does
            model.pipe.to(device)
            for each in model.adapters:
                each.adapter.to(device)
        set_scheduler(model.pipe, args.scheduler)
        check_schedule(model.pipe.scheduler, args.steps)
        factor = model.pipe.vae_scale_factor
        native = native_side(model.pipe.unet.config.sample_size) * factor
        size = image_size(sources[0].size, args.width, args.height, native, factor)
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


def read_mask(control: argparse.Namespace) -> "Image.Image | None":
    """The mask of `--mask`, as grey."""
    from nexus_adapters.conditions import load_image

    if control.mask is None:
        return None
    with names_as_options():
        return load_image(control.mask, control.max_megapixels, argument="--mask").convert("L")


def build_control(
    args: argparse.Namespace, loaded: LoadedAdapter, condition: "Image.Image", mask: "Image.Image | None"
) -> "Control":
    """The control of one map. ValueError names the option."""
    from nexus_adapters.injection import Control

    with names_as_options():
        return Control(loaded.adapter, condition, mask=mask, **settings_of_control(args))


def check_schedule(scheduler: Any, steps: int) -> None:
    """ValueError where so many steps would begin before the noisiest timestep of the training."""
    scheduler.set_timesteps(steps)
    trained = scheduler.config.num_train_timesteps
    if float(scheduler.timesteps[0]) > trained - 1:
        raise ValueError(
            f"--steps: expected fewer than the {trained} timesteps of training; received {steps}"
        )


def native_side(sample_size: int | Sequence[int] | None) -> int:
    """In latents, of a square as large as what a UNet says it was trained on; 64 where it does not say."""
    if sample_size is None:
        return 64
    return sample_size if isinstance(sample_size, int) else round(math.sqrt(math.prod(sample_size)))


def output_files(out: str, num: int, force: bool) -> list[Path]:
    """`out`, or for several images FILE-0001.png and so on; each checked."""
    from nexus_adapters.cli.files import check_output

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
    from nexus_adapters.embedded import EMBEDDED_GUIDANCE
    from nexus_adapters.evaluation.provenance import versions

    default_guidance = EMBEDDED_GUIDANCE if model.base == EMBEDDED else _GUIDANCE
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
        "source_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "options": used_options(args),
        "inverted": args.invert,
        "mask": None if mask is None else str(mask),
        "mask_sha256": None if mask is None else hashlib.sha256(mask.read_bytes()).hexdigest(),
        "adapter": loaded.name,
        "adapter_sha256": loaded.sha256,
    }


def generate(model: Model, controls: Sequence["Control"], settings: Mapping[str, Any]) -> "Image.Image":
    """One image. Never in batches: with its own seed each can be made again by itself, bit for bit.

    MemoryError where there is not enough of it, on whichever device.
    """
    import torch

    from nexus_adapters.injection import attach

    # On the CPU on every device, so that a seed means the same noise everywhere.
    generator = torch.Generator().manual_seed(settings["seed"])
    try:
        with attach(model.pipe, *controls):
            output = model.pipe(
                prompt=settings["prompt"],
                negative_prompt=settings["negative"],
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                width=settings["width"],
                height=settings["height"],
                generator=generator,
            )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size, device = f"{settings['width']}x{settings['height']}", settings["device"]
        raise MemoryError(
            f"not enough memory on {device} for {size}; --width, --height and --dtype make it less"
        ) from error
    image: Image.Image = output.images[0]
    return image


def save(file: Path, image: "Image.Image", settings: Mapping[str, Any], force: bool) -> None:
    """Write the image with its settings, and say where; beside a file that came while it was drawn."""
    from nexus_adapters.cli.files import save_png

    if file.exists() and not force:
        file = file.with_name(f"{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    save_png(file, image, settings, force)
    print(f"{file}: {image.width}x{image.height}, seed {settings['seed']}", flush=True)
