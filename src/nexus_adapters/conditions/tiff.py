"""Decode TIFF files. libtiff reports damage on stderr and continues; here damage is an error.

If a fax-compressed strip ends early, Pillow leaves the rest of the image uninitialized, so the image differs
each time. OpenCV clears its memory first, and its libtiff reports errors that Pillow suppresses.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

_COMPRESSION, _FAX = 259, (2, 3, 4)  # the tag; CCITT's one-dimensional, group 3 and group 4
# A line of libtiff starts with its function, such as Fax4Decode, or with Pillow's name for the file.
# A line of OpenCV starts with its level.
_MESSAGE = re.compile(
    rb"\[ ?(?:WARN|ERROR)\b.*|_?(?=\w*[a-z])[A-Z]\w*[A-Z]\w*: .+|tempfile\.tif: .+|More samples per pixel .+"
)
_HARMLESS = re.compile(rb"\[ ?WARN\b(?!.* Fax\w*: )")  # mostly unknown tags
_ORIGIN = re.compile(rb"\[.*? TIFF_\w+ ")
_TURN = Lock()  # stderr belongs to the whole process


def load_tiff(image: Any) -> Image.Image:
    """Decode an opened TIFF. Raises `OSError` with libtiff's message if it reports damage."""
    with _messages() as messages:
        decoded = _load_fax(image) if image.tag_v2.get(_COMPRESSION) in _FAX else _load(image)
    if messages:
        raise OSError(messages[0])
    return decoded


def _load(image: Any) -> Image.Image:
    image.load()
    return image  # type: ignore[no-any-return]


def _load_fax(image: Any) -> Image.Image:
    import cv2

    image.fp.seek(0)
    encoded = np.frombuffer(image.fp.read(), np.uint8)
    # OpenCV 4 has these functions in cv2, and does not report what libtiff says: damage goes unnoticed there.
    logging: Any = getattr(cv2.utils, "logging", cv2)
    level = logging.getLogLevel()
    logging.setLogLevel(3)  # warnings
    try:
        pixels: Any = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
    finally:
        logging.setLogLevel(level)
    if pixels is None:
        raise OSError("its pixels cannot be decoded")
    return Image.fromarray(pixels)


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Collect, when the block ends, what libtiff wrote to stderr; pass everything else on to stderr."""
    found: list[str] = []
    with _TURN, tempfile.TemporaryFile() as file:
        try:
            stderr = os.dup(2)
        except OSError:  # a service without stderr
            yield found
            return
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(stderr, 2)
            file.seek(0)
            for line in file.read().splitlines(keepends=True):
                if line.strip() and not _MESSAGE.match(line):  # from another thread
                    os.write(stderr, line)
                elif line.strip() and not _HARMLESS.match(line):
                    found.append(_ORIGIN.sub(b"", line).decode(errors="replace").strip())
            os.close(stderr)
