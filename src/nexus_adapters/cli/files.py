"""Writing results: whole or not at all, and over an existing file only with `force`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import replacing, write_json

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
