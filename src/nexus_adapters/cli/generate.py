"""`nexus generate`: an image that follows a prompt and a structure map."""

import argparse
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters import __version__
from nexus_adapters.cli import generate_requests, library_logs_as_warnings
from nexus_adapters.cli.control_requests import ControlRequest, MapSource
from nexus_adapters.cli.generate_requests import GenerateRequest, parse
from nexus_adapters.cli.generation import (
    LoadedAdapter,
    Model,
    build_control,
    check_loras,
    check_methods,
    check_schedule,
    check_size,
    extractor_options,
    find_adapters,
    generate_image,
    load_loras,
    load_model,
    lora_settings,
    read_mask,
    read_source,
    set_scheduler,
)
from nexus_adapters.cli.options import choose_device, expect_area, save_png, without_folders
from nexus_adapters.files import file_sha256, without_folder
from nexus_adapters.progress import bar_options

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = (
    'nexus generate --prompt "a red star on a blue background" --map edges.png --out star.png',
    'nexus generate --prompt "a slice of chocolate cake" --image cake.jpg \\\n'
    "    --base path/to/sd15 --adapter path/to/adapter --scale 0.8 --out cake.png",
)
# Function arguments whose names differ from those of the options.
TYPED = {"unet": "--base", "pipe_or_denoiser": "--base", "scheduler.prediction_type": "--base"}
add_arguments = generate_requests.add_arguments


def run(args: argparse.Namespace) -> int:
    """Generate the requested images."""
    generate_images(parse(args))
    return 0


def generate_images(request: GenerateRequest) -> None:
    """Check the request, load the models, generate the images one by one, and print each path."""
    controls = request.controls
    adapters = find_adapters(controls, request.base.path)
    check_loras(request.loras)
    sources, controls = zip(*(read_source(control) for control in controls), strict=True)
    request = replace(request, controls=controls)
    masks = [read_mask(control) for control in controls]
    device = choose_device(request.device)
    with library_logs_as_warnings():
        import torch

        from nexus_adapters.evaluation.provenance import choose_dtype
        from nexus_adapters.injection.condition import image_size

        for control, source in zip(controls, sources, strict=True):
            check_size(control, source, request.width, request.height)
        check_methods(controls, adapters)
        dtype = choose_dtype(request.dtype, torch.device(device))
        model = load_model(request.base.source, adapters, dtype)
        load_loras(model.pipe, request.loras)
        if device != "cpu":  # already there; diffusers would also warn that float16 fails there: it works
            model.pipe.to(device)
            for each in model.adapters:
                each.adapter.to(device)
        set_scheduler(model.pipe, request.scheduler)
        check_schedule(model.pipe.scheduler, request.steps)
        multiple = model.pipe.vae_scale_factor
        height, width = image_size(
            (sources[0].height, sources[0].width),
            request.height,
            request.width,
            model.native_size,
            multiple,
            controls[0].given.option,
            "--height and --width",
        )
        size = width, height
        expect_area(*size)
        attached = [
            build_control(control, loaded, source, mask, size)
            for control, loaded, source, mask in zip(controls, model.adapters, sources, masks, strict=True)
        ]
        settings = settings_of(request, model, size)
        for index, file in enumerate(request.files):
            model.pipe.set_progress_bar_config(desc=f"generating {file.name}", unit="step", **bar_options())
            own = settings | {"seed": request.seed + index}
            save(file, generate_image(model, attached, own), own, request.force)


def settings_of(request: GenerateRequest, model: Model, size: tuple[int, int]) -> dict[str, Any]:
    """Return everything needed to generate an image again, except its seed.

    Paths are reduced to their last part: a shared image should not reveal the names of its author's folders.
    The first control's settings are top-level keys; those of further controls are in "more_controls".
    """
    from nexus_adapters.evaluation.provenance import versions

    first, *others = _settings_of_controls(request.controls, model.adapters)
    return {
        "version": __version__,
        "command": "generate",
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": request.steps,
        "scheduler": request.scheduler,
        "guidance": request.guidance,
        **first,
        **({"more_controls": others} if others else {}),
        "width": size[0],
        "height": size[1],
        "base": without_folder(model.base),
        "base_config": request.base.config and without_folder(request.base.config),
        "prediction_type": request.base.prediction_type,
        "base_unet_sha256": model.base_unet_sha256,
        "loras": lora_settings(request.loras),
        "device": model.pipe.device.type,
        "dtype": str(model.pipe.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _settings_of_controls(
    controls: Sequence[ControlRequest], adapters: Sequence[LoadedAdapter]
) -> list[dict[str, Any]]:
    return [
        {
            **control.settings(),
            "balance": control.balance,
            "condition": control.condition_name,
            "source": "map" if isinstance(control.given, MapSource) else "image",
            "source_file": Path(control.given.file).name,
            "source_sha256": file_sha256(Path(control.given.file)),
            "options": without_folders(extractor_options(control)),
            "inverted": control.invert,
            "mask": None if control.mask is None else Path(control.mask).name,
            "mask_sha256": None if control.mask is None else file_sha256(Path(control.mask)),
            "adapter": without_folder(loaded.name),
            "adapter_sha256": loaded.sha256,
        }
        for control, loaded in zip(controls, adapters, strict=True)
    ]


def save(file: Path, image: "Image.Image", settings: Mapping[str, Any], force: bool) -> None:
    """Write the image with its settings and print the path; never overwrite a file without `force`."""
    if file.exists() and not force:
        file = file.with_name(f"{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    save_png(file, image, settings, force)
    print(f"{file}: {image.width}x{image.height}, seed {settings['seed']}", flush=True)
