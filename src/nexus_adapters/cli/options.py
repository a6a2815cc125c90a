"""What commands share: options, each declared once, and checks of values, devices and output files."""

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.choices import (
    CONDITION,
    DEFAULT_POLICY,
    DEVICES,
    DTYPES,
    GUIDANCE_SCALE,
    MAX_MEGAPIXELS,
    POLICIES,
    PREDICTION_TYPES,
    STEPS,
)
from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.files import replacing, without_folder, write_json

if TYPE_CHECKING:
    from PIL import Image

ADAPTER = "prime"
"""The adapter that is used with an embedded base where none is named."""
ADAPTER_SOURCES = (
    "a name (prime, slim, prime-paper, slim-paper, t2i), folder, Hub id, file, training run, checkpoint or "
    "pipeline"
)
"""In the help of whatever takes an adapter."""

SETTINGS_KEY = "nexus-adapters"  # keyword of the PNG text chunk that holds the settings as JSON

# Option -> what `add_argument` takes. An option has the same name, meaning and default in all commands.
_SHARED: dict[str, dict[str, Any]] = {
    "--force": {"action": "store_true", "help": "overwrite existing files"},
    "--condition": {
        "default": CONDITION,
        "metavar": "NAME",
        "help": f"kind of structure map (default: {CONDITION})",
    },
    "--base": {
        "default": EMBEDDED,
        "metavar": "PATH",
        "help": "Stable Diffusion 1.x, 2.x or XL: a folder, Hub id or .safetensors file; needs an --adapter "
        f"that was trained for it (default: {EMBEDDED})",
    },
    "--base-config": {
        "metavar": "PATH",
        "help": "for a --base in one file: a folder or Hub id in diffusers' layout; only its configs and "
        "tokenizer are read (default: the Hub's)",
    },
    "--prediction-type": {
        "choices": PREDICTION_TYPES,
        "help": "for a --base in one file: what it predicts; required for Stable Diffusion 2.x",
    },
    "--device": {
        "choices": DEVICES,
        "default": "auto",
        "help": "where models run (default: cuda if available, else mps, else cpu)",
    },
    "--dtype": {
        "choices": DTYPES,
        "default": "auto",
        "help": "precision of the models (default: float16 on cuda, else float32)",
    },
    "--steps": {
        "type": int,
        "default": STEPS,
        "metavar": "N",
        "help": f"denoising steps (default: {STEPS})",
    },
    "--guidance": {
        "type": float,
        "metavar": "N",
        "help": f"guidance scale (default: {GUIDANCE_SCALE:g}; embedded base: "
        f"{BUNDLED[EMBEDDED].guidance_scale:g})",
    },
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "seed of all that is random (default: 0)"},
    "--scale": {
        "type": float,
        "default": 1.0,
        "metavar": "N",
        "help": "strength of the adapter; 0 is the base alone (default: 1)",
    },
    "--policy": {
        "choices": POLICIES,
        "default": DEFAULT_POLICY,
        "help": f"which text the adapter reads (default: {DEFAULT_POLICY})",
    },
    "--noise-exponent": {
        "type": float,
        "metavar": "P",
        "help": "how features fade as the noise does: they are multiplied by its share of the variance to "
        "this power (default: as the adapter was trained)",
    },
    "--option": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "an option of the extractor, such as auto=true, sigma=2 or model=FOLDER (repeatable)",
    },
    "--low": {"type": float, "metavar": "N", "help": "canny: lower threshold (default: 100)"},
    "--high": {"type": float, "metavar": "N", "help": "canny: upper threshold (default: 200)"},
    "--invert": {
        "action": argparse.BooleanOptionalAction,
        "default": None,
        "help": "invert the map (default: only a given one whose lines are dark on white)",
    },
    "--max-megapixels": {
        "type": float,
        "default": MAX_MEGAPIXELS,
        "metavar": "N",
        "help": f"refuse larger images (default: {MAX_MEGAPIXELS})",
    },
    "--batch-size": {
        "type": int,
        "default": 8,
        "metavar": "N",
        "help": "images per call of a model (default: 8)",
    },
    "--kind": {"default": "auto", "help": "what the data are (default: detected)"},
    "--image-column": {"metavar": "NAME", "help": "column or tar member of the images"},
    "--caption-column": {
        "metavar": "NAME",
        "help": "column or tar member of the captions; NAME:KEY for a key of the JSON objects in it",
    },
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "override a value of the TOML file (repeatable)",
    },
    "--dry-run": {"action": "store_true", "help": "check all that is given, and print what would be done"},
    "--preview": {
        "metavar": "FILE",
        "help": "as --dry-run, and write a page (.html) of samples with their maps and captions",
    },
}


def add_options(parser: Any, *options: str, **changes: Any) -> None:
    """Declare options that other commands have too.

    Args:
        parser: of the command, or one of its groups.
        options: such as "--steps".
        changes: what is different in this command, as `add_argument` takes it.
    """
    for option in options:
        parser.add_argument(option, **{**_SHARED[option], **changes})


def expect_finite(argument: str, value: float) -> None:
    """Refuse infinities and what is not a number."""
    expect(math.isfinite(value), argument, "a finite number", value)


def expect_between(argument: str, value: int, low: int, high: int) -> None:
    """Refuse integers outside `low` to `high`, both included."""
    expect(low <= value <= high, argument, f"an integer from {low} to {high}", value)


def expect_side(argument: str, value: int | None) -> None:
    """Refuse an image side that latents cannot have. None, for a side not given, passes."""
    expect(value is None or (value > 0 and value % 8 == 0), argument, "a positive multiple of 8", value)


def expect_area(width: int, height: int) -> None:
    """Refuse images that no memory holds."""
    size = f"{width}x{height}"
    fits = width * height <= MAX_MEGAPIXELS * 1_000_000
    expect(fits, "--width and --height", f"an image of at most {MAX_MEGAPIXELS} megapixels", size)


def choose_device(device: str) -> str:
    """`device`, or for "auto" the first available of cuda, mps and cpu. `InvalidArgument` names --device."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_there in available.items() if is_there]
    if device == "auto":
        return present[0]
    expect(device in present, "--device", f"an available device ({', '.join(present)})", device)
    return device


def check_output(path: str | os.PathLike[str], suffix: str, force: bool, argument: str = "--out") -> Path:
    """Check, before any work is done, that a file can go to `path`.

    Raises:
        InvalidArgument: named `argument`, for another suffix, a missing or write-protected folder, a folder
            in the file's place, or an existing file without `force`.
    """
    file = Path(path)
    if os.fspath(path).endswith("/"):
        raise InvalidArgument(argument, f"a file name that ends in {suffix}", f"'{os.fspath(path)}'")
    if file.suffix.lower() != suffix:
        raise InvalidArgument(argument, f"a file name that ends in {suffix}", f"'{file}'")
    if not file.parent.is_dir():
        raise InvalidArgument(argument, "a file in an existing folder", f"'{file}'")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise InvalidArgument(argument, "a folder that can be written to", f"'{file.parent}'")
    if file.exists() and not file.is_file():
        raise InvalidArgument(argument, "a file", f"'{file}', which is something else")
    if file.exists() and not force:
        raise InvalidArgument(argument, "a new file", f"'{file}', which exists", "--force overwrites it")
    return file


def check_toml(path: str, argument: str) -> None:
    """`InvalidArgument` unless it is a file; whether it is TOML is found out when it is read."""
    why = "is not a file" if os.path.lexists(path) else "does not exist"
    expect(os.path.isfile(path), argument, "a TOML file", f"'{path}', which {why}")


def check_preview(path: str) -> Path:
    """`check_output` of --preview, which overwrites nothing."""
    expect(not os.path.lexists(path), "--preview", "a new file", f"'{path}', which exists")
    return check_output(path, ".html", False, "--preview")


def save_png(
    path: str | os.PathLike[str],
    image: "Image.Image",
    settings: Mapping[str, object],
    force: bool,
    argument: str = "--out",
) -> None:
    """Write `image` as PNG, with `settings` (anything that JSON holds) as a text chunk."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    with replacing(check_output(path, ".png", force, argument)) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def without_folders(options: Mapping[str, object]) -> dict[str, object]:
    """Options of an extractor as settings record them: of paths, such as a model's, the last part alone."""
    return {
        name: without_folder(value) if isinstance(value, str) else value for name, value in options.items()
    }


def save_json(path: str | os.PathLike[str], content: object, force: bool, argument: str = "--out") -> None:
    """Write `content` as indented JSON."""
    write_json(check_output(path, ".json", force, argument), content, indent=2)
