"""A shard of a prepared set: a tar that is written atomically, with equal bytes for equal samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from nexus_adapters.choices import ImageFormat
from nexus_adapters.files import replacing

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
_PNG = {"format": "PNG", "compress_level": 4}  # takes half as long as 6; files are 3 % larger
_WEBP = {"format": "WEBP", "lossless": True, "quality": 50, "exact": True}
_SAVED: dict[str, dict[str, Any]] = {"jpg": _JPEG, "png": _PNG, "webp": _WEBP}


def encode_image(image: Image.Image, image_format: ImageFormat) -> bytes:
    """Return an encoded RGB image; lossless except for "jpg"."""
    return _saved(image, _SAVED[image_format])


def encode_map(condition: Image.Image) -> bytes:
    """Return an RGB map as a PNG file, stored as gray or black and white if that is lossless."""
    pixels = np.asarray(condition)
    red = np.ascontiguousarray(pixels[..., 0])
    if not ((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all()):
        return _saved(condition, _PNG)
    grey = Image.fromarray(red)
    is_two_toned = not (red + np.uint8(1) > 1).any()  # 0 and 255 alone become 1 and 0
    return _saved(grey.convert("1", dither=Image.Dither.NONE) if is_two_toned else grey, _PNG)


def sample_members(
    key: str,
    image: tuple[str, bytes],
    conditions: Mapping[str, bytes],
    about: Mapping[str, Any],
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a sample's files in WebDataset's layout.

    Args:
        key: the sample's key: unique in the set and without dots.
        image: extension and content of the image.
        conditions: name of a map -> its PNG file.
        about: content of the JSON file. The first of its "captions" is also written as .txt for other
            readers.
    """
    extension, content = image
    yield f"{key}.{extension}", content
    for name, png in conditions.items():
        yield f"{key}.{name}.png", png
    yield f"{key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    yield f"{key}.txt", about["captions"][0].encode("utf-8", "replace")


def _saved(image: Image.Image, options: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    image = image.copy()
    image.info = {}  # drop the source's comments and color profile, which no longer fit the pixels
    image.save(stream, **options)
    return stream.getvalue()


class ShardFile:
    """A tar that is written in another folder and then moved to its path by `finish`.

    Args:
        path: path of the finished tar.
        folder: the folder where it is written, on the same file system.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.samples = path, 0
        self._replacing = ExitStack()
        self._hashed = _Hashed(self._replacing.enter_context(replacing(path, folder)))
        self._tar = tarfile.open(fileobj=self._hashed, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, content: bytes) -> None:
        """Append a file without timestamp and owner."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._tar.addfile(member, io.BytesIO(content))

    def finish(self) -> tuple[int, str]:
        """Move the tar to its path. Returns its size in bytes and its SHA-256."""
        self._tar.close()
        self._replacing.close()
        return self._hashed.size, self._hashed.digest.hexdigest()

    def discard(self) -> None:
        """Delete what has been written. Does nothing after `finish`."""
        with suppress(OSError):  # such as a full disk, which may be why it is discarded
            self._tar.close()  # or it would write its end when it is garbage-collected
        with suppress(_DiscardedError, OSError), self._replacing:
            raise _DiscardedError


class _DiscardedError(Exception):
    """Makes `replacing` delete its unfinished file."""


class _Hashed(io.RawIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.digest, self.size, self._file = hashlib.sha256(), 0, file

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]  # tarfile gives bytes
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)
