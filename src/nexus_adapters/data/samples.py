"""What every kind of dataset is to training: a `Source` of samples by index, decoded when they are read.

Whatever is wrong with a sample is a `BadSample` that names it and says what.
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

_MAX_TEXT = 2**24  # bytes of a file of captions


def no_column(argument: str, wanted: str, present: Iterable[object], where: str) -> InvalidArgument:
    """The error that `wanted` is none of the columns that are present; it lists them and hints at one."""
    names = [str(name) for name in present]
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else ""
    hint = separator_hint(names) or hint
    there = ", ".join(names) or "none"
    return InvalidArgument(argument, f"a column of {where} ({there})", f"'{wanted}'", hint)


def separator_hint(names: Sequence[str]) -> str:
    """What to do about a table whose columns are all in one, since another character separates them."""
    is_one = len(names) == 1 and any(separator in names[0] for separator in ";\t|")
    return "Separate the columns by commas, or by tabs in a .tsv" if is_one else ""


def split_column(column: str, present: Collection[str]) -> tuple[str, str | None]:
    """Column and key of COLUMN:KEY, such as "json:caption"; a column that has the whole name has no key."""
    name, colon, key = column.partition(":")
    return (name, key) if colon and key and column not in present else (column, None)


def captions_at(value: object, key: str | None) -> tuple[str, ...] | None:
    """The captions that a value is; with a key, those that a JSON object or its text has there."""
    if key is None:
        return as_captions(value)
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return as_captions(found.get(key)) if isinstance(found, dict) else None


def json_keys(captions: Sequence[str]) -> list[str]:
    """The keys of the first caption that is a JSON object and therefore no caption; [] where none is."""
    for caption in captions:
        text = caption.strip()
        if text.startswith("{") and text.endswith("}"):
            with suppress(ValueError, RecursionError):
                if found := json.loads(text):
                    return list(found)
    return []


def as_captions(value: object) -> tuple[str, ...] | None:
    """The captions of a string or of a list of strings, at least one; None for anything else."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(caption, str) for caption in value):
        return tuple(value)
    return None


class BadSample(ValueError):  # noqa: N818  # about the data, and most often no fault of a program
    """One sample that cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class Sample:
    """One sample, decoded.

    Attributes:
        key: names it in messages and reports: a path, or such as "shard.tar/00012".
        image: RGB, upright.
        condition: its structure map, in the mode that it is stored in, for `read_map`; None where the data
        set has none, and an extractor makes it.
        captions: at least one; "" is allowed.
        original_size: (width, height) of the image before a prepared set fitted it; None for its own.
        condition_key: names the map in messages; "" for `key`.
    """

    key: str
    image: Image.Image
    condition: Image.Image | None
    captions: tuple[str, ...]
    original_size: tuple[int, int] | None = None
    condition_key: str = ""

    def __post_init__(self) -> None:
        """BadSample for a caption that is no Unicode text, which tokenizers and UTF-8 files refuse."""
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
    """A dataset, always in the same order. It can be pickled, and opens files when it needs them.

    It knows nothing of geometry, extractors or training. What is wrong with the whole dataset is an
    InvalidArgument when it is opened; what is wrong with one sample is a BadSample when that one is read.
    """

    def __len__(self) -> int:
        """How many samples there are, readable or not."""
        ...

    def key(self, index: int) -> str:
        """The sample's name in messages and reports."""
        ...

    def content_hash(self, index: int) -> str:
        """SHA-256, in hex, over all that `load` reads: image, condition, captions. BadSample.

        For samples that are read from files it is `hash_sample`: the same in every kind of dataset.
        """
        ...

    def image_hash(self, index: int) -> str:
        """SHA-256, in hex, over the image alone, as `hash_image`: the same under any map and captions.

        BadSample for an image that cannot be read.
        """
        ...

    def stamp(self, index: int) -> str | None:
        """A text that changes when any of that may have changed, found without reading it; None for none."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of the image as `load` gives it, upright, from the header alone. BadSample."""
        ...

    def load(self, index: int) -> Sample:
        """Read and decode a sample. BadSample for what cannot be."""
        ...


_TURNED = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height
_PNG_SIGNATURE_BYTES = 8
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# The names of texts in which Pillow looks for an orientation.
_PNG_TEXT_NAMES = (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif", b"xmp")


def read_image(content: Content, argument: str, name: str) -> Image.Image:
    """The image, upright RGB, by `decode_image` with its limits; transparent parts are laid on white.

    Args:
        content: a file, or what is in it.
        argument: the part of the sample, such as "condition", for errors.
        name: of the content in errors.
    """
    with _as_bad_sample(argument, name):
        return decode_image(content, argument=argument, name=name)


def read_stored_map(content: Content, argument: str, name: str) -> Image.Image:
    """A structure map, upright, in its own mode; arguments as `read_image`."""
    with _as_bad_sample(argument, name):
        return decode_as_stored(content, argument=argument, name=name)


def read_size(content: Content, argument: str, name: str) -> tuple[int, int]:
    """(width, height) of what `read_image` gives, from the header alone."""
    with _as_bad_sample(argument, name), open_image(content, argument=argument, name=name) as image:
        try:
            return _upright_size(image)
        except Exception as error:  # damaged EXIF data raise almost anything
            raise BadSample(
                f"{argument}: expected a readable image, got '{name}', which is corrupt ({one_line(error)})"
            ) from error


def read_text(content: bytes | Path, argument: str, name: str) -> str:
    """UTF-8 text, without white space around it; of a file, at most 16 MiB."""
    with _as_bad_sample(argument, name):
        try:
            text = content if isinstance(content, bytes) else read_regular(content, _MAX_TEXT)
            return text.decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSample(f"{argument}: expected text in UTF-8, got '{name}' ({error})") from error


def read_words(content: bytes | Path, name: str) -> str:
    """A caption, as `read_text`. BadSample for a JSON object, which has captions but is none."""
    text = read_text(content, "captions", name)
    if keys := json_keys([text]):
        raise BadSample(
            f"captions: expected words, got a JSON object with {', '.join(keys)[:100]} in '{name}'"
        )
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """An image of a sample: which one, what it is read from, and its name in errors."""

    argument: str
    content: bytes | Path | None
    name: str


def hash_sample(parts: Sequence[Part], captions: Sequence[str]) -> str:
    """SHA-256 over the bytes of the parts that there are, and over the captions. BadSample names the part."""
    digests = [_hash_part(part, part.content) for part in parts if part.content is not None]
    return hashlib.sha256(json.dumps([digests, list(captions)]).encode()).hexdigest()


def hash_image(content: bytes | Path, name: str) -> str:
    """SHA-256 over the bytes of an image, as a file has them. BadSample names it."""
    return _hash_part(Part("image", content, name), content)


def _hash_part(part: Part, content: bytes | Path) -> str:
    with _as_bad_sample(part.argument, part.name):
        return _digest(content)


def file_stamp(file: Path) -> list[str | int]:
    """Name, size and times of a file. OSError where there is none."""
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
    except ValueError as error:  # of decode_image: it names the argument and what came
        raise BadSample(str(error)) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise BadSample(f"{argument}: expected a readable file, got '{name}' ({reason})") from error


def _upright_size(image: Any) -> tuple[int, int]:
    orientation = ExifTags.Base.Orientation
    if image.format == "PNG" and _has_exif_at_the_end(image.fp):
        image.load()  # rare, and the only way to it
    width, height = image.size
    if image.format == "TIFF" and orientation in image.tag_v2:
        return width, height  # Pillow has turned it already
    exif = Image.Image.getexif(image)  # not PngImageFile's own, which decodes the pixels first
    return (height, width) if exif.get(orientation) in _TURNED else (width, height)


def _has_exif_at_the_end(file: Any) -> bool:
    """Whether a PNG may give its orientation after its pixels, found by going from chunk to chunk."""
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
        file.seek(start + length + 4)  # past the data and their checksum
    return False
