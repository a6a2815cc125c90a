"""A shard of a prepared set: a tar written whole or not at all, the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from nexus_adapters.files import replacing

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
_PNG = {"format": "PNG", "compress_level": 4}  # half of the time of 6, for files 3 % larger
_WEBP = {"format": "WEBP", "lossless": True, "quality": 50, "exact": True}
_SAVED: dict[str, dict[str, Any]] = {"jpg": _JPEG, "png": _PNG, "webp": _WEBP}


def encode_image(image: Image.Image, image_format: Literal["jpg", "png", "webp"]) -> bytes:
    """Of RGB; what is not "jpg" is without loss."""
    return _saved(image, _SAVED[image_format])


def encode_map(condition: Image.Image) -> bytes:
    """PNG of RGB, in grey or black and white where that says the same: read as RGB, it is the same map."""
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
    """Name and content of a sample's files, in WebDataset's layout.

    Args:
        key: unique in the set, without dots.
        image: extension and content.
        conditions: name -> PNG.
        about: goes to the JSON; its "captions" are also read by others, who know only one .txt.
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
    image.info = {}  # comments and profiles of the source, which would not fit the pixels any more
    image.save(stream, **options)
    return stream.getvalue()


class ShardFile:
    """A tar that is written in another folder, and put in its place by `finish`.

    Args:
        path: where it goes.
        folder: where it is written, on the same file system.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.samples = path, 0
        self._replacing = ExitStack()
        self._hashed = _Hashed(self._replacing.enter_context(replacing(path, folder)))
        self._tar = tarfile.open(fileobj=self._hashed, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, content: bytes) -> None:
        """Append a file of no time and no owner."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._tar.addfile(member, io.BytesIO(content))

    def finish(self) -> tuple[int, str]:
        """Put the tar in its place. Gives its size in bytes, and its SHA-256."""
        self._tar.close()
        self._replacing.close()
        return self._hashed.size, self._hashed.digest.hexdigest()

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # of a full disk, say, which is why it is abandoned
            self._tar.close()  # or it would write its end when it is collected
        with suppress(_AbandonedError, OSError), self._replacing:
            raise _AbandonedError


class _AbandonedError(Exception):
    """Lets `replacing` remove what it has begun."""


class _Hashed(io.RawIOBase):
    """Hands on what is written, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.digest, self.size, self._file = hashlib.sha256(), 0, file

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]  # tarfile gives bytes
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)
