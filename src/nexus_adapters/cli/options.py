"""Options that several commands share: help, checks, devices, precision and output files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.files import replacing, write_json

if TYPE_CHECKING:
    import torch

# Help texts of options that several commands have.
ADAPTER_HELP = (
    "a name (prime, slim, prime-paper, slim-paper, t2i), folder, Hub id, file, training run, checkpoint or "
    "pipeline"
)
BASE_CONFIG_HELP = (
    "for a --base in one file: a folder or Hub id in diffusers' layout; only its configs and tokenizer are "
    "read (default: the Hub's)"
)
PREDICTION_TYPE_HELP = "for a --base in one file: what it predicts; required for Stable Diffusion 2.x"
PREDICTION_TYPES = ("epsilon", "v_prediction")


def expect_finite(argument: str, value: float) -> None:
    """Refuse infinities and what is not a number."""
    expect(math.isfinite(value), argument, "a finite number", value)


def expect_between(argument: str, value: int, low: int, high: int) -> None:
    """Refuse integers outside `low` to `high`, both included."""
    expect(low <= value <= high, argument, f"an integer from {low} to {high}", value)


def expect_side(argument: str, value: int | None) -> None:
    """Refuse an image side that latents cannot have. None, for a side not given, passes."""
    expect(value is None or (value > 0 and value % 8 == 0), argument, "a positive multiple of 8", value)


DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def choose_device(device: str) -> str:
    """`device`, or for "auto" the first available of cuda, mps and cpu. `InvalidArgument` names --device."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_there in available.items() if is_there]
    if device == "auto":
        return present[0]
    expect(device in present, "--device", f"an available device ({', '.join(present)})", device)
    return device


def choose_dtype(dtype: str, device: str) -> "torch.dtype":
    """`dtype` by name; for "auto" float16 on cuda, and float32 elsewhere."""
    import torch

    name = ("float16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    chosen: torch.dtype = getattr(torch, name)
    return chosen


SETTINGS_KEY = "nexus-adapters"  # keyword of the PNG text chunk that holds the settings as JSON


def check_output(path: str | os.PathLike[str], suffix: str, force: bool, argument: str = "--out") -> Path:
    """Check, before any work is done, that a file can go to `path`.

    Raises:
        InvalidArgument: named `argument`, for another suffix, a missing or write-protected folder, a folder
            in the file's place, or an existing file without `force`.
    """
    file = Path(path)
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


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image,
    settings: Mapping[str, object],
    force: bool,
    argument: str = "--out",
) -> None:
    """Write `image` as PNG, with `settings` (anything that JSON holds) as a text chunk."""
    chunks = PngInfo()
    chunks.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    with replacing(check_output(path, ".png", force, argument)) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def read_settings(path: str | os.PathLike[str]) -> dict[str, object]:
    """Give back the settings that `save_png` embedded; `InvalidArgument` where there are none."""
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        raise InvalidArgument("path", "a PNG with nexus-adapters' settings", f"'{path}', which has none")
    settings: dict[str, object] = json.loads(text)
    return settings


def save_json(path: str | os.PathLike[str], content: object, force: bool, argument: str = "--out") -> None:
    """Write `content` as indented JSON."""
    write_json(check_output(path, ".json", force, argument), content, indent=2)
