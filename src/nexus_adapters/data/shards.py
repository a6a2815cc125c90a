"""The tar files that a list of shards means, wherever they lie."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from nexus_adapters.data.remote import RemoteShard
from nexus_adapters.errors import InvalidArgument

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@runtime_checkable
class Shard(Protocol):
    """One tar file."""

    @property
    def name(self) -> str:
        """What errors and keys call it."""
        ...

    @property
    def place(self) -> str:
        """Its path or URL, whole, which an index is kept by. It may hold a secret, and is never shown."""
        ...

    def version(self) -> str | None:
        """What changes when the file does; None where that cannot be told now."""
        ...

    def open(self, version: str) -> io.FileIO:
        """The file of that version, unbuffered, since a sample is one read. InvalidArgument or OSError."""
        ...


class LocalShard:
    """A file here."""

    def __init__(self, path: str) -> None:
        self.name, self.place = path, str(Path(path).absolute())

    def version(self) -> str:
        """Size and time of the last change."""
        status = Path(self.place).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def open(self, version: str) -> io.FileIO:
        """The file as it is."""
        return io.FileIO(self.place)


def find_shards(patterns: Sequence[str], folder: Path, keep: int) -> list[Shard]:
    """The shards in the order in which they are listed, those of a glob sorted.

    Args:
        patterns: paths, globs of paths, URLs; in each a range stands for all its numbers, with leading zeros
            where its first one has them, such as "train-{000..127}.tar".
        folder: where those behind URLs are kept.
        keep: how many of them.

    Raises:
        InvalidArgument: for no patterns, a pattern that no file fits, or a range that falls.
    """
    if isinstance(patterns, str) or not patterns:
        raise InvalidArgument("shards", "a list of at least one path or URL", repr(patterns))
    expanded = [place for pattern in patterns for place in _expand_ranges(pattern)]
    found: list[Shard] = []
    for place in expanded:
        if "://" in place:
            found.append(RemoteShard(place, folder, keep))
        else:
            found += [LocalShard(path) for path in _expand_glob(place)]
    return found


def _expand_ranges(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise InvalidArgument("shards", "a rising range", f"{found.group()} in '{pattern}'")
    before, after = pattern[: found.start()], _expand_ranges(pattern[found.end() :])
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [before + number + end for number in numbers for end in after]


def _expand_glob(path: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    matches = sorted(match for match in glob.glob(path, recursive=True) if Path(match).is_file())
    if not matches:
        reason = "which is a folder" if Path(path).is_dir() else "which matches no file"
        raise InvalidArgument("shards", "tar files", f"'{path}', {reason}")
    return matches
