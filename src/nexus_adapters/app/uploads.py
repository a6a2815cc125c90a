"""The limits of uploaded pictures, checked before anything is decoded."""

from __future__ import annotations

from pathlib import Path

from nexus_adapters.conditions.images import open_image
from nexus_adapters.errors import InvalidArgument

MAX_BYTES = 20 * 1024 * 1024
MAX_MEGAPIXELS = 24
MAX_EVENT_MEGAPIXELS = 128
"""Of all files of one event together."""

_MAX_NAME = 80


def check_upload(content: bytes | Path, name: str = "") -> int:
    """Check an uploaded picture by its content, whatever its name says, and read no more than its header.

    Args:
        content: the file or its bytes.
        name: the user's name for the file, for the error.

    Returns:
        its number of pixels.

    Raises:
        InvalidArgument: named "image", for a file of more than `MAX_BYTES` bytes or `MAX_MEGAPIXELS`
            megapixels, or one that is not an image in one of `conditions.images.FORMATS`.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    label = _short(name)
    if size > MAX_BYTES:
        received = f"'{label}', {_mebibytes(size)}"
        raise InvalidArgument("image", f"a file of at most {_mebibytes(MAX_BYTES)}", received)
    with open_image(content, MAX_MEGAPIXELS, "image", label) as image:
        return image.width * image.height


def _short(name: str) -> str:
    """Return a file's name without its folders, short enough for one line."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return (last if len(last) <= _MAX_NAME else f"{last[: _MAX_NAME - 1]}…") or "picture"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
