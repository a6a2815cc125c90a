"""Writing results: whole or not at all, and over an existing file only when told so."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS_KEY = "nexus-adapters"  # keyword of the PNG text chunk that holds the settings as JSON


def check_output(path: str | os.PathLike[str], suffix: str, force: bool, argument: str = "--out") -> Path:
    """Check, before any work is done, that a file can go to `path`.

    Raises:
        ValueError: for another suffix, a missing or write-protected folder, a folder in the file's place, or
            an existing file without `force`; it names `argument`.
    """
    file = Path(path)
    if file.suffix.lower() != suffix:
        raise ValueError(f"{argument}: expected a file name that ends in {suffix}; received '{file}'")
    if not file.parent.is_dir():
        raise ValueError(f"{argument}: expected an existing folder; received '{file.parent}'")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}: expected a folder that can be written to; received '{file.parent}'")
    if file.exists() and not file.is_file():
        raise ValueError(f"{argument}: expected a file; received '{file}', which is something else")
    if file.exists() and not force:
        raise ValueError(
            f"{argument}: expected a new file; received '{file}', which exists (--force overwrites)"
        )
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
    with _replacing(check_output(path, ".png", force, argument)) as stream:
        image.save(stream, format="PNG", pnginfo=chunks)


def read_settings(path: str | os.PathLike[str]) -> dict[str, object]:
    """Give back the settings that `save_png` embedded; a ValueError where there are none."""
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        raise ValueError(f"path: expected a PNG with nexus-adapters' settings; received '{path}' without")
    settings: dict[str, object] = json.loads(text)
    return settings


def save_json(path: str | os.PathLike[str], content: object, force: bool, argument: str = "--out") -> None:
    """Write `content` as indented JSON."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with _replacing(check_output(path, ".json", force, argument)) as stream:
        stream.write(text.encode())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a stream that becomes the file `path` when the block ends well, and otherwise nothing."""
    target = Path(os.path.realpath(path))  # a link stays a link
    # In the same folder, since os.replace is atomic only within one file system. Opened by name and not by
    # `tempfile`, whose files only their owner may read.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
