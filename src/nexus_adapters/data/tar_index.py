"""What is in a tar and where, found by its headers once and kept."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from nexus_adapters.data.shards import Shard
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import write_json

_FORMAT = 1  # of the files; a new number makes them all anew
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class TarIndex:
    """The whole members of a tar.

    Attributes:
        version: of the file, as its shard says it.
        size: of the file, in bytes.
        is_whole: False where the file ends early, or is damaged behind the members.
        members: name, offset and size of each regular file, in order.
    """

    version: str
    size: int
    is_whole: bool
    members: list[tuple[str, int, int]]


def find_index(shard: Shard, version: str | None, folder: Path) -> TarIndex:
    """The index of a shard: the one kept in `folder`, or where the file has changed since, a new one.

    Args:
        shard: the tar.
        version: of the shard now; None where that is not known, and the kept one is taken to be right.
        folder: where indices are kept, each under a name made of the shard's place.

    Raises:
        InvalidArgument: for a file that is no uncompressed tar, or a folder that cannot be written to.
    """
    file = folder / f"{hashlib.sha256(shard.place.encode()).hexdigest()[:32]}.json"
    index = _read(file)
    if index is None or version not in (None, index.version):
        with shard.open(version or "") as stream:
            index = index_tar(stream, shard.name, version or "")
        _write(file, index)
    if not index.is_whole:
        warnings.warn(
            f"shards: '{shard.name}' ends early or is damaged; {len(index.members)} files before it are used",
            stacklevel=2,
        )
    return index


def index_tar(stream: io.FileIO, name: str, version: str) -> TarIndex:
    """Read the headers of a tar, and nothing else of it. InvalidArgument for a file that is none."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    is_packed = stream.read(2) == _GZIP
    stream.seek(0)
    members = []
    try:
        archive = tarfile.TarFile(fileobj=stream)
    except OSError:
        raise
    except Exception as error:  # as in _next
        reason = "which is compressed" if is_packed else f"which is not a tar ({error})"
        raise InvalidArgument("shards", "an uncompressed tar", f"'{name}', {reason}") from error
    while (info := _next(archive)) is not None:
        if info.isreg() and not info.issparse() and info.offset_data + info.size <= size:
            members.append((info.name, info.offset_data, info.size))
    # A tar ends with blocks of zeros; tarfile takes a damaged or missing header for the end, too.
    stream.seek(archive.offset)
    is_whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    return TarIndex(version, size, is_whole, members)


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except OSError:
        raise
    except Exception:  # tarfile's own errors, and what damaged numbers and names raise
        return None


def _read(file: Path) -> TarIndex | None:
    """None where there is none, or none that can be read: it is made again."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("format") != _FORMAT:
            return None
        members = [(str(name), int(offset), int(size)) for name, offset, size in stored.pop("members")]
        return TarIndex(**stored, members=members)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(file: Path, index: TarIndex) -> None:
    try:
        write_json(file, {"format": _FORMAT, **asdict(index)})
    except OSError as error:
        raise InvalidArgument(
            "index_folder", "a folder that can be written to", f"'{file.parent}' ({error.strerror})"
        ) from error
