"""WebDataset tars as samples, from disk or from URLs, read in any order without unpacking."""

from __future__ import annotations

import io
import json
import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from nexus_adapters.data.ignored import Ignored
from nexus_adapters.data.samples import (
    BadSample,
    Part,
    Sample,
    hash_image,
    hash_sample,
    json_keys,
    read_image,
    read_size,
    read_stored_map,
    read_text,
)
from nexus_adapters.data.shards import Shard, find_shards
from nexus_adapters.data.tar_index import (
    CAPTIONS,
    CONDITION,
    IMAGE,
    Layout,
    TarSamples,
    check_parts,
    find_index,
    group_members,
)
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.progress import progress

_CONNECTIONS = 8  # concurrent requests for the shards' versions


class FilePart(io.RawIOBase):
    """`size` bytes of `file` starting at `offset`, as a separate file. Closing it leaves `file` open."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size = file, offset, size
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset within the part."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer up to the end of the part. Returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view[: max(0, self._size - self._position)])
        self._position += count or 0
        return count or 0


class TarSource:
    """The samples of tars in WebDataset's layout: files with the same name before the first dot are a sample.

    Names with more dots are separate samples if each has an image and captions (`group_members`).

    The headers of each tar are read once into an index, which is stored; then each sample is read by its
    offset. Nothing is unpacked, and the members' names are never used as paths.

    The complete samples of a truncated tar are used, with a warning. Reading a sample without image, map or
    captions raises BadSample.

    Args:
        shards: paths, globs of paths, and URLs (http(s), or any protocol that fsspec supports); a range is
            written as in "train-{000..127}.tar". Tars at URLs are downloaded completely when they are needed,
            and all of them once for their index.
        image_column: extension of the images; None for the first that exists of jpg, jpeg, png and webp.
        condition_column: extension of the structure maps, such as "canny.png"; None if there are none.
        caption_column: extension of text files with one caption each, or "json:KEY" for a string or a list of
            strings in a JSON object; None for "txt".
        index_folder: where indices are stored, and tars from URLs in its subfolder "shards".
        keep_shards: how many tars from URLs are kept; the least recently used are deleted.
        extracted: extensions of all maps of the samples if an extractor made them. They are RGB whatever mode
            they are stored in, so gray ones are not label ids.
        with_captions: False ignores captions: every sample has the empty caption.

    Raises:
        InvalidArgument: for an empty list of shards, a file that is not an uncompressed tar, tars without
            samples, or an extension that no sample has.
        OSError: for a URL that cannot be reached.
    """

    def __init__(
        self,
        shards: Sequence[str],
        image_column: str | None = None,
        condition_column: str | None = None,
        caption_column: str | None = None,
        *,
        index_folder: str | os.PathLike[str],
        keep_shards: int = 8,
        extracted: Collection[str] = (),
        with_captions: bool = True,
    ) -> None:
        if keep_shards < 1:
            raise InvalidArgument("keep_shards", "at least 1", keep_shards)
        self._read_map = read_image if extracted else read_stored_map
        self._layout = Layout.of(image_column, condition_column, caption_column, with_captions)
        folder = _created(Path(index_folder))
        self._shards = find_shards(shards, folder / "shards", keep_shards)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            versions = list(pool.map(_version, self._shards))
        self._versions: list[str] = []
        ignored = Ignored()
        self._samples: list[TarSamples] = []
        listed = zip(self._shards, versions, strict=True)
        for shard, version in progress(list(listed), what="reading shards", unit="shard", delay=2):
            index = find_index(shard, version, folder)
            self._versions.append(index.version)
            self._samples.append(group_members(index, self._layout, ignored, extracted))
        check_parts(self._samples, self._layout)
        self._ends = list(accumulate(len(samples.stems) for samples in self._samples))
        self._check_captions()
        self.ignored = str(ignored)
        ignored.report(f"{self._shards[0].name}{', ...' if len(self._shards) > 1 else ''}")

    def _check_captions(self) -> None:
        """Raise `InvalidArgument` if the captions are whole JSON objects."""
        captions = self._layout.captions or ""
        if self._layout.caption_key is None and captions.rpartition(".")[2] == "json":
            keys: list[str] = []
            with suppress(BadSample):
                keys = json_keys([read_text(self._read(0, CAPTIONS), "captions", self.key(0))])
            raise InvalidArgument(
                "caption_column",
                f"{captions}:KEY with a key of the JSON objects",
                f"'{captions}'",
                f"The first object has the keys {', '.join(keys)[:200]}" if keys else "",
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def shard_of(self, index: int) -> int:
        """Return the index of the sample's shard, from 0, with which an order can keep shards together."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return bisect_right(self._ends, index)

    def version(self, index: int) -> str:
        """Return text that changes when the sample's shard does. Nothing is downloaded."""
        return self._versions[self.shard_of(index)]

    def key(self, index: int) -> str:
        """Return the shard and the sample's name in it."""
        shard, row = self._find(index)
        stem = self._samples[shard].stems[row]
        printable = "".join(character if character.isprintable() else "?" for character in stem)
        return f"{self._shards[shard].name}/{printable}"

    def content_hash(self, index: int) -> str:
        """Return the SHA-256 of image, structure map and captions. Raises BadSample."""
        parts = [Part("image", self._read(index, IMAGE), self.key(index))]
        if self._layout.condition is not None:
            parts.append(Part("condition", self._read(index, CONDITION), self.key(index)))
        return hash_sample(parts, self._captions(index))

    def image_hash(self, index: int) -> str:
        """Return the SHA-256 of the image's bytes. Raises BadSample."""
        return hash_image(self._read(index, IMAGE), self.key(index))

    def stamp(self, index: int) -> str:
        """Return the shard, its version, and the sample's position in it. Nothing is downloaded."""
        shard, row = self._find(index)
        return json.dumps([self._shards[shard].place, self._versions[shard], repr(self._layout), row])

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of the upright image, from its header. Raises BadSample."""
        offset, size = self._place(index, IMAGE)
        with self._open(index) as file:
            member: io.BufferedReader = io.BufferedReader(FilePart(file, offset, size))
            return read_size(member, "image", self.key(index))

    def load(self, index: int) -> Sample:
        """Decode a sample. Raises BadSample."""
        key, captions = self.key(index), self._captions(index)
        image = read_image(self._read(index, IMAGE), "image", key)
        condition = None
        if self._layout.condition is not None:
            condition = self._read_map(self._read(index, CONDITION), "condition", key)
        name = f"{key}.{self._layout.condition}" if self._layout.condition is not None else ""
        return Sample(key, image, condition, captions, condition_key=name)

    def _captions(self, index: int) -> tuple[str, ...]:
        if self._layout.captions is None:
            return ("",)
        return self._layout.read_captions(self._read(index, CAPTIONS), self.key(index))

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of a sample and its row in the shard."""
        shard = self.shard_of(index)
        return shard, index - (self._ends[shard] - len(self._samples[shard].stems))

    def _open(self, index: int) -> io.FileIO:
        shard = self.shard_of(index)
        return self._shards[shard].open(self._versions[shard])

    def _place(self, index: int, part: int) -> tuple[int, int]:
        shard, row = self._find(index)
        place = self._samples[shard].place(row, part)
        if place is None:
            name, extensions = next(
                (name, ends) for wanted, name, ends in self._layout.wanted() if wanted == part
            )
            raise BadSample(f"{name}: '{self.key(index)}' has no file .{' or .'.join(extensions)}")
        return place

    def _read(self, index: int, part: int) -> bytes:
        offset, size = self._place(index, part)
        with self._open(index) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise BadSample(f"shards: expected {size} bytes for '{self.key(index)}', got {len(content)}")
        return content


def _created(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            "index_folder", "a folder that can be created", f"'{folder}' ({error.strerror})"
        ) from error
    return folder


def _version(shard: Shard) -> str | None:
    try:
        return shard.version()
    except OSError as error:
        raise InvalidArgument("shards", "a readable file", f"'{shard.name}' ({error.strerror})") from error
