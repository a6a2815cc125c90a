"""The index of each tar, which is made once and stored, and how members form samples as in WebDataset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from nexus_adapters.data.ignored import Ignored
from nexus_adapters.data.samples import BadSample, captions_at, no_column, read_text, read_words
from nexus_adapters.data.shards import Shard
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import write_json

_FORMAT = 1  # format of the files; a new number makes all of them be written again
_GZIP = b"\x1f\x8b"
_MAX_HEADER = 2**20  # bytes; headers with long names have a few hundred
_IMAGES = ("jpg", "jpeg", "png", "webp")
_ABSENT = -1  # offset and size of a part that is missing from a sample

IMAGE, CONDITION, CAPTIONS = range(3)  # the parts of a sample


@dataclass(frozen=True)
class TarIndex:
    """The complete members of a tar.

    Attributes:
        version: the file's version, from `Shard.version`.
        size: size of the file in bytes.
        is_whole: False if the file is truncated or damaged after the members.
        members: name, offset and size of each regular file, in order.
    """

    version: str
    size: int
    is_whole: bool
    members: list[tuple[str, int, int]]


def find_index(shard: Shard, version: str | None, folder: Path) -> TarIndex:
    """Return the index of a shard: the one in `folder`, or a new one if the file has changed.

    Args:
        shard: the tar.
        version: the shard's current version; None if unknown, so that an existing index is used.
        folder: the folder of all indices, each of which is named by a hash of its shard's location.

    Raises:
        InvalidArgument: for a file that is not an uncompressed tar, or a folder that cannot be written to.
    """
    file = folder / f"{hashlib.sha256(shard.place.encode()).hexdigest()[:32]}.json"
    index = _read(file)
    if index is None or version not in (None, index.version):
        with shard.open(version or "") as stream:
            index = index_tar(stream, shard.name, version or "")
        _write(file, index)
    if not index.is_whole:
        warnings.warn(
            f"shards: '{shard.name}' is truncated or damaged; its first {len(index.members)} files are used",
            stacklevel=2,
        )
    return index


def index_tar(stream: io.FileIO, name: str, version: str) -> TarIndex:
    """Index a tar by reading only its headers. Raises `InvalidArgument` for any other file.

    Reading ends at the first damaged header, such as one with a negative size, and at the first member that
    extends beyond the end of the file.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    is_packed = stream.read(2) == _GZIP
    stream.seek(0)
    members = []
    try:
        archive = tarfile.TarFile(fileobj=_Headers(stream))  # type: ignore[arg-type]  # it reads and seeks
    except _DamagedError as error:
        raise InvalidArgument("shards", "an uncompressed tar", f"'{name}', which is damaged") from error
    except OSError:
        raise
    except Exception as error:  # as in _next
        reason = "which is compressed" if is_packed else f"which is not a tar ({error})"
        raise InvalidArgument("shards", "an uncompressed tar", f"'{name}', {reason}") from error
    end = 0
    while (info := _next(archive)) is not None:
        # Headers with negative sizes lead backward, and tarfile would read the same ones forever.
        if info.size < 0 or not end < archive.offset:
            break
        end = archive.offset
        if info.isreg() and not info.issparse() and info.offset_data + info.size <= size:
            members.append((info.name, info.offset_data, info.size))
        if end >= size:
            break
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all headers
    # A tar ends with blocks of zeros; tarfile also treats a damaged or missing header as the end.
    is_whole = end == archive.offset < size and _is_zero(stream, end)
    return TarIndex(version, size, is_whole, members)


def _is_zero(stream: io.FileIO, offset: int) -> bool:
    stream.seek(offset)
    return stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except _DamagedError:
        return None
    except OSError:
        raise
    except Exception:  # tarfile's own errors, and those raised by damaged numbers and names
        return None


class _DamagedError(Exception):
    """A header has values that do not occur in an undamaged tar."""


class _Headers:
    """A stream for `tarfile` that limits reads, since a damaged header could make it read a whole file."""

    def __init__(self, stream: io.FileIO) -> None:
        self._stream, self.tell = stream, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise _DamagedError(f"a header of {size} bytes")
        return self._stream.read(size)

    def seek(self, offset: int) -> int:
        if not 0 <= offset < 2**63:
            raise _DamagedError(f"an offset of {offset}")
        return self._stream.seek(offset)


def _read(file: Path) -> TarIndex | None:
    """The index in a file; None if it is missing or unreadable, so that it is made again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            return None
        members = [(str(name), int(offset), int(size)) for name, offset, size in content.pop("members")]
        return TarIndex(**content, members=members)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(file: Path, index: TarIndex) -> None:
    try:
        write_json(file, {"format": _FORMAT, **asdict(index)})
    except OSError as error:
        raise InvalidArgument(
            "index_folder", "a folder that can be written to", f"'{file.parent}' ({error.strerror})"
        ) from error


@dataclass(frozen=True)
class Layout:
    """The extensions of a sample's parts, each starting after the first dot of the file's name.

    Attributes:
        image: extensions of images; the first that exists is read.
        condition: extension of structure maps; None if there are none.
        captions: extension of text files with one caption each, or of JSON objects; None to ignore captions.
        caption_key: key of the captions, a string or a list of strings, in the JSON object; None for text.
    """

    image: tuple[str, ...]
    condition: str | None
    captions: str | None
    caption_key: str | None

    @classmethod
    def of(
        cls,
        image_column: str | None,
        condition_column: str | None,
        caption_column: str | None,
        with_captions: bool = True,
    ) -> Layout:
        """Return the layout for the columns that users name; None for a default: any image, no map, "txt"."""
        condition = None if condition_column is None else _extension(condition_column)
        usual = tuple(extension for extension in _IMAGES if extension != condition)
        images = usual if image_column is None else (_extension(image_column),)
        captions, _, key = (caption_column or "txt").partition(":")
        if not with_captions:
            return cls(images, condition, None, None)
        return cls(images, condition, _extension(captions), key or None)

    def wanted(self) -> Iterator[tuple[int, str, tuple[str, ...]]]:
        """Yield part, argument and extensions of all parts that a sample must have."""
        yield IMAGE, "image_column", self.image
        if self.condition is not None:
            yield CONDITION, "condition_column", (self.condition,)
        if self.captions is not None:
            yield CAPTIONS, "caption_column", (self.captions,)

    def read_captions(self, content: bytes, name: str) -> tuple[str, ...]:
        """Return the captions in a member's bytes. Raises BadSample."""
        if self.caption_key is None:
            return (read_words(content, name),)
        captions = captions_at(read_text(content, "captions", name), self.caption_key)
        if captions is None:
            raise BadSample(
                f"captions: expected a JSON object with a string or strings as '{self.caption_key}', "
                f"got something else in '{name}'"
            )
        return captions


@dataclass
class TarSamples:
    """The samples of one tar, in order. They use little memory, since there can be millions.

    Attributes:
        stems: the samples' names, as determined by `group_members`.
        places: offset and size of each part; -1 if it is missing.
        extensions: extensions of all members, wanted or not.
    """

    stems: list[str]
    places: Int[np.ndarray, "n 3 2"]
    extensions: set[str] = field(default_factory=set)

    def place(self, row: int, part: int) -> tuple[int, int] | None:
        """Return offset and size of a sample's part; None if it is missing."""
        offset, size = self.places[row, part]
        return None if offset == _ABSENT else (int(offset), int(size))


_Place = tuple[int, int]


def group_members(
    index: TarIndex, layout: Layout, ignored: Ignored | None = None, maps: Collection[str] = ()
) -> TarSamples:
    """Group members with the same stem into samples.

    Of several members with the same name the last is used, as in unpacking. Names are compared independently
    of their Unicode form (NFC, NFD) and of a leading "./".

    The stem ends at the first dot of the file's name (`0.jpg`, `0.seg.png`), unless image and captions share
    a longer one: `a.1.jpg` with `a.1.txt` and `a.2.jpg` with `a.2.txt` are two samples.

    In a truncated tar, the last sample is dropped if a part of it is missing.

    Args:
        index: the tar's index.
        layout: the parts of a sample.
        ignored: counts the members that are not used because of others.
        maps: extensions of all maps in the samples, wanted or not, which are not images themselves.
    """
    ignored = Ignored() if ignored is None else ignored
    groups: dict[str, dict[str, tuple[int, int, str]]] = {}
    first_names: dict[str, str] = {}  # group -> its stem in the spelling of its first member
    for name, offset, size in index.members:
        folder, slash, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if stem and dot:
            key = _one_form(str(PurePosixPath(folder + slash + stem)))
            extension = _one_form(extension)
            first_names.setdefault(key, folder + slash + stem)
            group = groups.setdefault(key, {})
            if extension.lower() in group:
                ignored.add("members replaced by a later one with the same name", name)
            group[extension.lower()] = offset, size, extension
    stems: list[str] = []
    found: list[list[_Place]] = []
    extensions: set[str] = set()
    wanted = list(layout.wanted())
    for name, group in groups.items():
        stem = first_names[name]
        keys = _keys(group, layout) if any("." in extension for extension in group) else {"": True}
        spelled = {"": ""}  # key -> the same before it was converted to lower case
        for extension, (_, _, original) in group.items():
            key = next((key for key in _beginnings(extension) if keys.get(key)), "")
            spelled.setdefault(key, original[: len(key)])
            extensions.add(extension[len(key) :].removeprefix("."))
        for key, is_sample in keys.items():
            if is_sample:
                stems.append(f"{stem}.{spelled[key]}" if key else stem)
                found.append(_places(group, key, wanted))
            else:
                ends = (*layout.image, *filter(None, [layout.captions]))
                left_out = next((name for end in ends if (name := f"{key}.{end}") in group), None)
                if left_out is not None and left_out not in maps:
                    ignored.add("second images or captions of a sample", f"{stem}.{left_out}")
    places = np.array(found, np.int64).reshape(len(stems), 3, 2)
    needed = [part for part, _, _ in wanted]
    if stems and not index.is_whole and (places[-1, needed] == _ABSENT).any():
        stems, places = stems[:-1], places[:-1]
    return TarSamples(stems, places, extensions)


def _keys(extensions: Collection[str], layout: Layout) -> dict[str, bool]:
    """Return key (the rest of a name after a common stem, or "") -> whether it is a separate sample.

    A key without its own image or captions belongs to the sample with a shorter key, if there is one.
    """
    has: dict[str, set[int]] = {}
    for extension in extensions:
        dotted = f".{extension}"
        if layout.condition and dotted.endswith(f".{layout.condition}"):
            continue
        for part, _, wanted in layout.wanted():
            end = next((end for end in wanted if dotted.endswith(f".{end}")), None)
            if end is not None and part != CONDITION:
                has.setdefault(dotted[1 : -len(end) - 1], set()).add(part)
    if not has:
        return {"": True}
    return {
        key: parts == {IMAGE, CAPTIONS} or not any(shorter in has for shorter in _beginnings(key))
        for key, parts in has.items()
    }


def _beginnings(name: str) -> Iterator[str]:
    """The parts of a name before each dot, longest first, then "": for "a.b.c", "a.b", "a" and ""."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _places(
    group: Mapping[str, tuple[int, int, str]], key: str, wanted: Iterable[tuple[int, str, tuple[str, ...]]]
) -> list[_Place]:
    places = [(_ABSENT, _ABSENT)] * 3
    for part, _, extensions in wanted:
        names = (f"{key}.{extension}" if key else extension for extension in extensions)
        found = next((group[name] for name in names if name in group), None)
        if found is not None:
            places[part] = found[:2]
    return places


def check_parts(shards: list[TarSamples], layout: Layout) -> None:
    """Raise `InvalidArgument` if there are no samples, or if a part is missing from all of them."""
    if not any(samples.stems for samples in shards):
        raise InvalidArgument("shards", "samples, such as 00012.jpg with 00012.txt", "tars without any")
    present = sorted(set().union(*(samples.extensions for samples in shards)))
    for part, argument, extensions in layout.wanted():
        if all((samples.places[:, part] == _ABSENT).all() for samples in shards):
            raise no_column(argument, extensions[0], present, "the tars, by extension")


def _extension(column: str) -> str:
    return _one_form(column).lower().removeprefix(".")


def _one_form(name: str) -> str:
    """A name in a single Unicode form, since tars can use either."""
    return unicodedata.normalize("NFC", name)
