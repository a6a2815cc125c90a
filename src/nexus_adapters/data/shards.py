"""The tar files in a list of shards: local ones, and copies of those at URLs."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from nexus_adapters.errors import InvalidArgument, one_line, redacted
from nexus_adapters.files import STALE_AFTER_S, lock, open_regular, remove_unfinished, replacing_file

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000  # of a pattern's ranges; a larger number is a typo and would fill the memory
_TIMEOUT_S = 60.0
_WAITS_S = (1.0, 4.0)  # before the second and the third attempt
_BLOCK = 2**20  # bytes copied at a time
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")  # fsspec's names


@runtime_checkable
class Shard(Protocol):
    """One tar file."""

    @property
    def name(self) -> str:
        """Its name in errors and keys."""
        ...

    @property
    def place(self) -> str:
        """Its full path or URL, which identifies its index. It may contain a secret, so it is never shown."""
        ...

    def version(self) -> str | None:
        """Return text that changes when the file does; None if it cannot be determined now."""
        ...

    def open(self, version: str) -> io.FileIO:
        """Open that version of the file, unbuffered, since a sample is a single read.

        Raises `InvalidArgument` or OSError if that fails.
        """
        ...


class LocalShard:
    """A local file."""

    def __init__(self, path: str) -> None:
        self.name, self.place = path, str(Path(path).absolute())

    def version(self) -> str:
        """Return size and time of the last change."""
        status = Path(self.place).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def open(self, version: str) -> io.FileIO:
        """Open the file in its current version."""
        return open_regular(Path(self.place))


@dataclass(frozen=True)
class Limits:
    """Limits of a download, so that a server cannot fill the disk or keep a run waiting forever.

    Attributes:
        most_bytes: largest size of a file.
        least_rate: lowest average rate, in bytes per second.
        grace_s: seconds during which it may be slower.
    """

    most_bytes: int = 2**36
    least_rate: float = 10_000.0
    grace_s: float = 120.0


class RemoteShard:
    """A file at a URL, downloaded completely by `fsspec` into a folder that all processes share.

    fsspec's own caches ("filecache", "simplecache") are not used. They download to the final name without a
    lock, so one process may read what another has half written. They delete files by age instead of number,
    never notice changes of a file at http(s), and store URLs including their secrets.

    Args:
        url: the file's URL: http(s), or any protocol that fsspec supports (s3, hf, gs, ...).
        folder: where downloaded files are kept; created when needed.
        keep: how many files are kept; the least recently used are deleted.
        waits_s: seconds to wait before each retry of a failed download.
        limits: limits of a download.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        keep: int,
        waits_s: tuple[float, ...] = _WAITS_S,
        limits: Limits = Limits(),
    ) -> None:
        self.place, self.folder, self.keep, self.waits_s = url, folder, keep, waits_s
        self.limits = limits
        self.name = redacted(url)

    def version(self) -> str | None:
        """Return size and ETag, or whatever else the server provides; None if it does not respond."""
        try:
            return _version(self.place)
        except InvalidArgument:
            raise
        except Exception:  # each of fsspec's file systems raises its own errors
            return None

    def open(self, version: str) -> io.FileIO:
        """Open the file, downloading it unless it is already there.

        Raises:
            InvalidArgument: if the server denies access, the file is too large, or a package for this kind of
                URL is missing.
            OSError: if it cannot be reached, or arrives incomplete or too slowly, after all attempts.
        """
        name = hashlib.sha256(f"{self.place}\n{version}".encode()).hexdigest()
        file = self.folder / f"{name[:32]}.tar"
        while True:  # another process may delete the file before it is open here
            with suppress(FileNotFoundError):
                os.utime(file)
                return io.FileIO(file)
            with lock(file.with_suffix(".lock")):  # several readers want a shard at the same time
                if not file.exists():
                    self._download(file)
            self._delete_all_but(file)

    def _download(self, file: Path) -> None:
        for wait in (*self.waits_s, None):
            try:
                with replacing_file(file) as unfinished:
                    self._copy(unfinished)
                return
            except InvalidArgument:
                raise
            except Exception as error:  # as in version
                reason = f"{type(error).__name__}: {one_line(error)}"
                if _is_final(error):
                    raise InvalidArgument(
                        "shards", "a file that can be downloaded", f"'{self.name}' ({reason})"
                    ) from error
                if wait is None:
                    raise OSError(f"cannot download '{self.name}' ({reason})") from error
                time.sleep(wait)

    def _copy(self, file: Path) -> None:
        """Download to a file. Raises OSError for an incomplete response, also without a length."""
        with file.open("wb") as out:
            if _is_http(self.place):
                with _request(self.place, "GET") as response:
                    length = response.headers.get("Content-Length")
                    expected = int(length) if length and length.isdecimal() else None
                    received = self._receive(response, out, expected)
            else:
                files, path = _file_system(self.place)
                size = files.info(path).get("size")
                expected = size if isinstance(size, int) else None
                with files.open(path, "rb") as stream:
                    received = self._receive(stream, out, expected)
        if expected is not None and expected != received:  # http.client does not report it
            raise OSError(f"the connection ended after {received} of {expected} bytes")
        if expected is None and not _ends_as_tar(file):
            raise OSError(f"the connection ended after {received} bytes, before the end of the tar")

    def _receive(self, stream: Any, out: BinaryIO, expected: int | None) -> int:
        """Copy a stream within the limits. Returns the number of bytes."""
        received, start = 0, time.monotonic()
        self._check_size(expected or 0)
        while block := _read_some(stream):
            received += len(block)
            self._check_size(received)
            out.write(block)
            late_s = time.monotonic() - start - self.limits.grace_s
            if late_s > 0 and received < late_s * self.limits.least_rate:
                raise OSError(f"too slow: {received} bytes in {time.monotonic() - start:.0f} s")
        return received

    def _check_size(self, size: int) -> None:
        if size > self.limits.most_bytes:
            raise InvalidArgument(
                "shards",
                f"shards of at most {self.limits.most_bytes:,} bytes",
                f"'{self.name}' of {size:,} bytes or more",
                "Download it yourself and use the path of the file",
            )

    def _delete_all_but(self, current: Path) -> None:
        """Delete all but the `keep` most recently used files, which include `current`."""
        used = {}
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process was faster
                used[file] = file.stat().st_mtime
        others = sorted((file for file in used if file != current), key=used.__getitem__)
        for file in others[: max(0, len(others) + 1 - self.keep)]:
            with suppress(OSError):  # already deleted, or open on a system that does not delete open files
                file.unlink()
        remove_unfinished(self.folder, STALE_AFTER_S)


def _is_final(error: Exception) -> bool:
    """Whether another attempt would fail in the same way."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
    return isinstance(error, FileNotFoundError | PermissionError | ValueError)


def _version(url: str) -> str:
    if _is_http(url):
        with _request(url, "HEAD") as response:
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            return f"{response.headers.get('Content-Length')} {tag}"
    files, path = _file_system(url)
    info = files.info(path)
    return f"{info.get('size')} {next((info[name] for name in _VERSIONS if info.get(name)), None)}"


def _read_some(stream: Any) -> bytes:
    """The bytes that have arrived, at most 1 MiB, so that a slow server does not block until it is full."""
    block: bytes = stream.read1(_BLOCK) if hasattr(stream, "read1") else stream.read(_BLOCK)
    return block


def _ends_as_tar(file: Path) -> bool:
    """Whether a file ends in at least two blocks of zeros, as tars do."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 1024))
        return size % 512 == 0 and stream.read() == bytes(1024)


def _is_http(url: str) -> bool:
    """Whether to use the standard library: for HTTP, fsspec needs aiohttp and assumes files never change."""
    return url.startswith(("http://", "https://"))


def _request(url: str, method: str) -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "nexus-adapters"})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package is missing, or the protocol is unknown
        scheme = url.partition("://")[0]
        raise InvalidArgument("shards", "URLs that fsspec supports", f"{scheme}:// ({error})") from error
    return files, path


def find_shards(patterns: Sequence[str], folder: Path, keep: int) -> list[Shard]:
    """Return the shards in the order of the patterns; those of a glob are sorted.

    Args:
        patterns: paths, globs of paths, and URLs. A range such as in "train-{000..127}.tar" stands for all of
            its numbers, with leading zeros if the first one has them.
        folder: where copies of files at URLs are kept.
        keep: how many copies are kept.

    Raises:
        InvalidArgument: for an empty list, a pattern that matches no file, or a descending range.
    """
    if isinstance(patterns, str) or not patterns:
        raise InvalidArgument("shards", "a list of at least one path or URL", repr(patterns))
    found: list[Shard] = []
    for pattern in patterns:
        # An existing file whose name looks like a range or a pattern is used as it is.
        places = [pattern] if "://" not in pattern and os.path.isfile(pattern) else _expand_ranges(pattern)
        for place in places:
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
    after = _expand_ranges(pattern[found.end() :])
    if (
        len(last) > len(str(_MOST_SHARDS)) + len(first)
        or (int(last) - int(first)) * len(after) >= _MOST_SHARDS
    ):
        raise InvalidArgument(
            "shards", f"ranges of at most {_MOST_SHARDS:,} files", f"{found.group()} in '{pattern}'"
        )
    if int(last) < int(first):
        raise InvalidArgument("shards", "an ascending range", f"{found.group()} in '{pattern}'")
    before = pattern[: found.start()]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [before + number + end for number in numbers for end in after]


def _expand_glob(path: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    # Brackets are common in folder names and rarely meant as a pattern.
    for pattern in (path, path.replace("[", "[[]")):
        matches = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if matches:
            return matches
    reason = "which is a folder" if Path(path).is_dir() else "which matches no file"
    if Path(path).exists() and not Path(path).is_dir():
        reason = "which is not a regular file"
    raise InvalidArgument("shards", "tar files", f"'{path}', {reason}")
