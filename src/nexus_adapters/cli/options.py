"""Shared by the commands: options, each declared once, and output files."""

import argparse
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
from nexus_adapters.files import replacing, write_json
from nexus_adapters.generation.settings import save_png as write_png

if TYPE_CHECKING:
    from PIL import Image

ADAPTER_SOURCES = (
    "a name (prime, slim, prime-paper, slim-paper, t2i), folder, Hub id, file, training run, checkpoint or "
    "pipeline"
)
"""Help text of every argument that takes an adapter."""

# Option -> arguments of `add_argument`. An option has the same name, meaning and default in all commands.
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
        "help": "Stable Diffusion 1.x, 2.x or XL: a folder, Hub id or .safetensors file; use it with an "
        f"--adapter that was trained for it (default: {EMBEDDED})",
    },
    "--base-config": {
        "metavar": "PATH",
        "help": "for a single-file --base: a folder or Hub id in diffusers format, of which only the configs "
        "and the tokenizer are read (default: downloaded from the Hub)",
    },
    "--prediction-type": {
        "choices": PREDICTION_TYPES,
        "help": "for a single-file --base: what it predicts; required for Stable Diffusion 2.x",
    },
    "--device": {
        "choices": DEVICES,
        "default": "auto",
        "help": "device to run on (default: cuda if available, else mps, else cpu)",
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
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "random seed (default: 0)"},
    "--scale": {
        "type": float,
        "default": 1.0,
        "metavar": "N",
        "help": "strength of the adapter; 0 turns it off (default: 1)",
    },
    "--policy": {
        "choices": POLICIES,
        "default": DEFAULT_POLICY,
        "help": f"which prompts the adapter reads (default: {DEFAULT_POLICY})",
    },
    "--noise-exponent": {
        "type": float,
        "metavar": "P",
        "help": "fade the adapter out with the noise: features are multiplied by the noise's share of the "
        "variance to the power P (default: as the adapter was trained)",
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
        "help": "invert the map (default: only if a given map has dark lines on white)",
    },
    "--max-megapixels": {
        "type": float,
        "default": MAX_MEGAPIXELS,
        "metavar": "N",
        "help": f"reject larger images (default: {MAX_MEGAPIXELS})",
    },
    "--batch-size": {
        "type": int,
        "default": 8,
        "metavar": "N",
        "help": "images per call of a model (default: 8)",
    },
    "--kind": {"default": "auto", "help": "format of the data (default: detected)"},
    "--image-column": {"metavar": "NAME", "help": "column or tar member that holds the images"},
    "--caption-column": {
        "metavar": "NAME",
        "help": "column or tar member that holds the captions; NAME:KEY reads KEY of its JSON objects",
    },
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "override a value of the TOML file (repeatable)",
    },
    "--dry-run": {"action": "store_true", "help": "check the input, print what would be done, and stop"},
    "--preview": {
        "metavar": "FILE",
        "help": "like --dry-run, and write an HTML page of samples with their maps and captions",
    },
}


def add_options(parser: Any, *options: str, **changes: Any) -> None:
    """Declare options that several commands share.

    Args:
        parser: the command's parser, or one of its argument groups.
        options: names such as "--steps".
        changes: arguments of `add_argument` that are different in this command.
    """
    for option in options:
        parser.add_argument(option, **{**_SHARED[option], **changes})


def as_option(name: str) -> str:
    """Return what the user typed for an extractor's option, as in "option sigma" -> "--option sigma"."""
    return f"--{name}" if name.startswith("option ") else name


def check_output(path: str | os.PathLike[str], suffix: str, force: bool, argument: str = "--out") -> Path:
    """Check, before any work is done, that a file can be written to `path`, and return the path.

    Raises:
        InvalidArgument: named `argument`, for another suffix, a missing or write-protected folder, a path
            that is a folder, or an existing file without `force`.
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
        raise InvalidArgument(argument, "a file", f"'{file}', which is not a file")
    if file.exists() and not force:
        received = f"'{file}', which already exists"
        raise InvalidArgument(argument, "a new file", received, "Use --force to overwrite it")
    return file


def check_toml(path: str, argument: str) -> None:
    """Raise `InvalidArgument` unless `path` is a file. Its content is checked when it is read."""
    why = "is not a file" if os.path.lexists(path) else "does not exist"
    expect(os.path.isfile(path), argument, "a TOML file", f"'{path}', which {why}")


def check_preview(path: str) -> Path:
    """Check the path of --preview, which must not exist, and return it."""
    expect(not os.path.lexists(path), "--preview", "a new file", f"'{path}', which already exists")
    return check_output(path, ".html", False, "--preview")


def save_png(
    path: str | os.PathLike[str],
    image: "Image.Image",
    settings: Mapping[str, object],
    force: bool,
    argument: str = "--out",
) -> None:
    """Write `image` as a PNG file with `settings`, which must be valid as JSON, in a text chunk."""
    with replacing(check_output(path, ".png", force, argument)) as stream:
        write_png(stream, image, settings)


def save_json(path: str | os.PathLike[str], content: object, force: bool, argument: str = "--out") -> None:
    """Write `content` as indented JSON."""
    write_json(check_output(path, ".json", force, argument), content, indent=2)
