"""The interface of all kinds of datasets: a `Source` of samples by index, decoded when they are read.

Anything wrong with a sample raises a `BadSample` that names the sample and the problem.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import ExifTags, Image

from nexus_adapters.conditions.images import Content, decode_as_stored, decode_image, open_image
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import file_sha256, read_regular

_MAX_TEXT = 2**24  # bytes in a file with captions


def no_column(argument: str, wanted: str, present: Iterable[object], where: str) -> InvalidArgument:
    """Return the error for a missing column; it lists those present and suggests the most similar one."""
    names = [str(name) for name in present]
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else ""
    hint = separator_hint(names) or hint
    there = ", ".join(names) or "none"
    return InvalidArgument(argument, f"a column of {where} ({there})", f"'{wanted}'", hint)


def separator_hint(names: Sequence[str]) -> str:
    """Return a hint for a table that looks like a single column because it has another separator."""
    is_one = len(names) == 1 and any(separator in names[0] for separator in ";\t|")
    return "Separate columns with commas, or with tabs in a .tsv file" if is_one else ""


def split_column(column: str, present: Collection[str]) -> tuple[str, str | None]:
    """Split COLUMN:KEY, such as "json:caption", into column and key.

    The key is None if there is no colon, or if a column has the whole name.
    """
    name, colon, key = column.partition(":")
    return (name, key) if colon and key and column not in present else (column, None)


def captions_at(value: object, key: str | None) -> tuple[str, ...] | None:
    """Return the captions in a value; with a key, those under the key of a JSON object or its text."""
    if key is None:
        return as_captions(value)
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return as_captions(found.get(key)) if isinstance(found, dict) else None


def json_keys(captions: Sequence[str]) -> list[str]:
    """Return the keys of the first caption that is really a JSON object; [] if there is none."""
    for caption in captions:
        text = caption.strip()
        if text.startswith("{") and text.endswith("}"):
            with suppress(ValueError, RecursionError):
                if found := json.loads(text):
                    return list(found)
    return []


def as_captions(value: object) -> tuple[str, ...] | None:
    """Return the captions in a string or a non-empty list of strings; None for anything else."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(caption, str) for caption in value):
        return tuple(value)
    return None


class BadSample(ValueError):  # noqa: N818  # a problem with the data, rarely a programming error
    """A sample that cannot be read. The message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """A decoded sample.

    Attributes:
        key: its name in messages and reports: a path, or a name such as "shard.tar/00012".
        image: upright RGB image.
        condition: its structure map in the mode in which it is stored, for `read_map`; None if the dataset
            has no maps, so that an extractor makes them.
        captions: at least one caption; "" is allowed.
        original_size: (width, height) of the image before `nexus prepare` fitted it; None for its current
            size.
        condition_key: the map's name in messages; "" for `key`.
    """

    key: str
    image: Image.Image
    condition: Image.Image | None
    captions: tuple[str, ...]
    original_size: tuple[int, int] | None = None
    condition_key: str = ""

    def __post_init__(self) -> None:
        """Raise BadSample for a caption that is not valid Unicode: tokenizers and UTF-8 files reject it."""
        for caption in self.captions:
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                shown = ascii(caption[max(0, error.start - 20) : error.end + 20])
                raise BadSample(
                    f"captions: expected Unicode text, got a lone surrogate in '{self.key}' ({shown})"
                ) from error


@runtime_checkable
class Source(Protocol):
    """A dataset in a fixed order. It can be pickled and opens files only when it needs them.

    It is independent of geometry, extractors and training. A problem with the whole dataset raises
    `InvalidArgument` when the dataset is opened; a problem with one sample raises `BadSample` when that
    sample is read.
    """

    def __len__(self) -> int:
        """Return the number of samples, including unreadable ones."""
        ...

    def key(self, index: int) -> str:
        """Return the sample's name in messages and reports."""
        ...

    def content_hash(self, index: int) -> str:
        """Return the SHA-256, in hex, of all that `load` reads: image, condition and captions.

        For samples that are read from files it is `hash_sample`, which is the same in every kind of dataset.

        Raises:
            BadSample: if the sample cannot be read.
        """
        ...

    def image_hash(self, index: int) -> str:
        """Return the SHA-256, in hex, of the image alone (`hash_image`), independent of map and captions.

        Raises:
            BadSample: if the image cannot be read.
        """
        ...

    def stamp(self, index: int) -> str | None:
        """Return text that changes if the sample may have changed, without reading it; None if unknown."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header alone. Raises BadSample."""
        ...

    def load(self, index: int) -> Sample:
        """Read and decode a sample. Raises BadSample if that fails."""
        ...


_TURNED = (5, 6, 7, 8)  # the EXIF orientations that swap width and height
_PNG_SIGNATURE_BYTES = 8
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# The names of text chunks in which Pillow looks for an orientation.
_PNG_TEXT_NAMES = (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif", b"xmp")


def read_image(content: Content, argument: str, name: str) -> Image.Image:
    """Decode an image, within the limits of `decode_image`, as upright RGB with transparency on white.

    Args:
        content: a file or its bytes.
        argument: the part of the sample, such as "condition", for errors.
        name: the name of the content for errors.

    Raises:
        BadSample: if the image cannot be decoded.
    """
    with _as_bad_sample(argument, name):
        return decode_image(content, argument=argument, name=name)


def read_stored_map(content: Content, argument: str, name: str) -> Image.Image:
    """Decode a structure map, upright and in its own mode. Arguments and errors are those of `read_image`."""
    with _as_bad_sample(argument, name):
        return decode_as_stored(content, argument=argument, name=name)


def read_size(content: Content, argument: str, name: str) -> tuple[int, int]:
    """Return (width, height) of the image that `read_image` returns, from the header alone."""
    with _as_bad_sample(argument, name), open_image(content, argument=argument, name=name) as image:
        try:
            return _upright_size(image)
        except Exception as error:  # damaged EXIF data can raise almost anything
            raise BadSample(
                f"{argument}: expected a readable image, got '{name}', which is corrupt ({one_line(error)})"
            ) from error


def read_text(content: bytes | Path, argument: str, name: str) -> str:
    """Read UTF-8 text, at most 16 MiB of a file, and strip whitespace around it. Raises BadSample."""
    with _as_bad_sample(argument, name):
        try:
            text = content if isinstance(content, bytes) else read_regular(content, _MAX_TEXT)
            return text.decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(f"{argument}: expected text in UTF-8, got '{name}' ({error})") from error


def read_words(content: bytes | Path, name: str) -> str:
    """Read a caption, as `read_text`. Raises BadSample for a JSON object, which may contain captions."""
    text = read_text(content, "captions", name)
    if keys := json_keys([text]):
        raise BadSample(
            f"captions: expected text, got a JSON object with {', '.join(keys)[:100]} in '{name}'"
        )
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """An image of a sample: which part it is, its content, and its name in errors."""

    argument: str
    content: bytes | Path | None
    name: str


def hash_sample(parts: Sequence[Part], captions: Sequence[str]) -> str:
    """Return the SHA-256 of the bytes of the parts and of the captions. Raises BadSample naming the part."""
    digests = [_hash_part(part, part.content) for part in parts if part.content is not None]
    return hashlib.sha256(json.dumps([digests, list(captions)]).encode()).hexdigest()


def hash_image(content: bytes | Path, name: str) -> str:
    """Return the SHA-256 of the bytes of an image file. Raises BadSample naming it."""
    return _hash_part(Part("image", content, name), content)


def _hash_part(part: Part, content: bytes | Path) -> str:
    with _as_bad_sample(part.argument, part.name):
        return _digest(content)


def file_stamp(file: Path) -> list[str | int]:
    """Return name, size and times of a file. Raises OSError if it is missing."""
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digest(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return file_sha256(content)


@contextmanager
def _as_bad_sample(argument: str, name: str) -> Iterator[None]:
    try:
        yield
    except BadSample:
        raise
    except ValueError as error:  # from decode_image; it names the argument and the content
        raise BadSample(str(error)) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSample(f"{argument}: expected a readable file, got '{name}' ({reason})") from error


def _upright_size(image: Any) -> tuple[int, int]:
    orientation = ExifTags.Base.Orientation
    if image.format == "PNG" and _has_exif_at_the_end(image.fp):
        image.load()  # rarely needed, and the only way to get the orientation
    width, height = image.size
    if image.format == "TIFF" and orientation in image.tag_v2:
        return width, height  # Pillow has already rotated it
    exif = Image.Image.getexif(image)  # not that of PngImageFile, which decodes the pixels first
    return (height, width) if exif.get(orientation) in _TURNED else (width, height)


def _has_exif_at_the_end(file: Any) -> bool:
    """Whether a PNG may have its orientation after its pixels; only chunk headers are read."""
    file.seek(_PNG_SIGNATURE_BYTES)
    is_after_pixels = False
    while len(header := file.read(8)) == 8:
        length, kind, start = int.from_bytes(header[:4], "big"), header[4:], file.tell()
        is_after_pixels |= kind == b"IDAT"
        if is_after_pixels and kind in _PNG_TEXTS:
            name = file.read(min(length, 80)).partition(b"\0")[0]
            kind = b"eXIf" if name in _PNG_TEXT_NAMES else kind
        if is_after_pixels and kind == b"eXIf":
            return True
        file.seek(start + length + 4)  # past the data and the checksum
    return False
