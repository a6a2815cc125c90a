"""`nexus generate`: an image that follows a prompt and a structure map."""

import argparse
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nexus_adapters.cli import generate_requests
from nexus_adapters.cli.generate_requests import output_files, parse
from nexus_adapters.cli.options import as_option, save_png
from nexus_adapters.errors import mentioned, renamed
from nexus_adapters.generation.images import check_scales, generate_image, prepare
from nexus_adapters.generation.maps import check_size, read_control
from nexus_adapters.generation.models import (
    check_loras,
    check_methods,
    choose_device,
    find_adapters,
    load_model,
)
from nexus_adapters.generation.requests import GenerateRequest
from nexus_adapters.library_logs import library_logs_as_warnings
from nexus_adapters.progress import bar_options

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = (
    'nexus generate --prompt "a red star on a blue background" --map edges.png --out star.png',
    'nexus generate --prompt "a slice of chocolate cake" --image cake.jpg \\\n'
    "    --base path/to/sd15 --adapter path/to/adapter --scale 0.8 --out cake.png",
)
# Function arguments whose names differ from those of the options.
TYPED = {
    "unet": "--base",
    "pipe_or_denoiser": "--base",
    "scheduler.prediction_type": "--base",
    "width and height": "--width and --height",
    "no_invert": "--no-invert",
}
_WARNED = ("image", "map", "mask", "scale")  # arguments that warnings begin with
add_arguments = generate_requests.add_arguments


def run(args: argparse.Namespace) -> int:
    """Generate the requested images."""
    with renamed(as_option), _warnings_as_typed(), _memory_as_typed():
        request = parse(args)
        generate_images(request, output_files(args.out, args.count, args.force), args.force)
    return 0


def generate_images(request: GenerateRequest, files: Sequence[Path], force: bool) -> None:
    """Check the request, load the models, generate the images one by one, and print each path."""
    check_scales(request)
    adapters = find_adapters(request.controls, request.base.path)
    check_loras(request.loras)
    read = [read_control(control) for control in request.controls]
    device = choose_device(request.device)
    with library_logs_as_warnings():
        import torch

        from nexus_adapters.evaluation.provenance import choose_dtype

        for each in read:
            check_size(each.request, each.source, request.width, request.height)
        check_methods(request.controls, adapters)
        dtype = choose_dtype(request.dtype, torch.device(device))
        model = load_model(request.base.source, adapters, dtype, device, request.loras)
        prepared = prepare(request, model, read)
        for seed, file in enumerate(files, start=request.seed):
            model.pipe.set_progress_bar_config(desc=f"generating {file.name}", unit="step", **bar_options())
            save(file, generate_image(model, prepared, seed), prepared.settings_of(seed), force)


@contextmanager
def _warnings_as_typed() -> Iterator[None]:
    """Name options instead of arguments in warnings that begin with the name of an argument."""
    show = warnings.showwarning

    def show_as_typed(message: Warning | str, category: type[Warning], *where: Any) -> None:
        name, colon, rest = str(message).partition(": ")
        text = f"--{name}{colon}{rest}" if name in _WARNED else str(message)
        show(category(text), category, *where)

    warnings.showwarning = cast(Any, show_as_typed)
    try:
        yield
    finally:
        warnings.showwarning = show


@contextmanager
def _memory_as_typed() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise MemoryError(mentioned(str(error), lambda name: f"--{name}")) from error


def save(file: Path, image: "Image.Image", settings: Mapping[str, Any], force: bool) -> None:
    """Write the image with its settings and print the path; never overwrite a file without `force`."""
    if file.exists() and not force:
        file = file.with_name(f"{file.stem}-{secrets.token_hex(4)}{file.suffix}")
    save_png(file, image, settings, force)
    print(f"{file}: {image.width}x{image.height}, seed {settings['seed']}", flush=True)
