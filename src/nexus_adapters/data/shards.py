"""The tar files that a list of shards means: local ones, and copies of those behind URLs."""

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
_MOST_SHARDS = 100_000  # of a pattern's ranges: more is a slip, and would fill the memory
_TIMEOUT_S = 60.0
_WAITS_S = (1.0, 4.0)  # before the second and the third attempt
_BLOCK = 2**20  # bytes that are copied at once
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")  # fsspec's names


@runtime_checkable
class Shard(Protocol):
    """One tar file."""

    @property
    def name(self) -> str:
        """How errors and keys name it."""
        ...

    @property
    def place(self) -> str:
        """Its whole path or URL, by which its index is found. It may hold a secret: it is never shown."""
        ...

    def version(self) -> str | None:
        """A text that changes when the file does; None where that cannot be found out now."""
        ...

    def open(self, version: str) -> io.FileIO:
        """The file of that version, unbuffered, since a sample is one read. InvalidArgument or OSError."""
        ...


class LocalShard:
    """A file on this machine."""

    def __init__(self, path: str) -> None:
        self.name, self.place = path, str(Path(path).absolute())

    def version(self) -> str:
        """Size and time of the last change."""
        status = Path(self.place).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def open(self, version: str) -> io.FileIO:
        """The file as it is."""
        return open_regular(Path(self.place))


@dataclass(frozen=True)
class Limits:
    """Of a download, so that a server cannot fill the disk, or keep a run waiting for ever.

    Attributes:
        most_bytes: of a file.
        least_rate: bytes a second, on average.
        grace_s: seconds for which it may be slower.
    """

    most_bytes: int = 2**36
    least_rate: float = 10_000.0
    grace_s: float = 120.0


class RemoteShard:
    """A file behind a URL, downloaded whole by `fsspec` into a folder that all processes share.

    fsspec's own caches ("filecache", "simplecache") are not used. They download to the final name without a
    lock, so that of several processes one reads what another has half written; they delete by age, not by
    number; they never notice that a file behind http(s) has changed; and they store URLs with their secrets.

    Args:
        url: of the file: http(s), or any protocol that fsspec reads (s3, hf, gs, ...).
        folder: where downloaded files are kept; created when it is needed.
        keep: how many; the least recently used are deleted.
        waits_s: seconds before each further attempt, where a download fails.
        limits: of a download.
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
        """Size and ETag, or what else the server has; None where it does not answer."""
        try:
            return _version(self.place)
        except InvalidArgument:
            raise
        except Exception:  # each file system below fsspec raises errors of its own
            return None

    def open(self, version: str) -> io.FileIO:
        """The file, downloaded unless it is kept.

        Raises:
            InvalidArgument: where the server refuses it, it is larger than the limit, or a package for such
                URLs is missing.
            OSError: where it cannot be reached, or arrives cut or too slowly, after all attempts.
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
        """Download to a file. A cut answer is an OSError, also where the server gives no length."""
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
                raise OSError(f"{received} bytes in {time.monotonic() - start:.0f} s are too slow")
        return received

    def _check_size(self, size: int) -> None:
        if size > self.limits.most_bytes:
            raise InvalidArgument(
                "shards",
                f"shards of at most {self.limits.most_bytes:,} bytes",
                f"'{self.name}' of {size:,} bytes or more",
                "Download it yourself and name the file",
            )

    def _delete_all_but(self, current: Path) -> None:
        """All but the `keep` most recently used, of which `current` is one."""
        used = {}
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process was faster
                used[file] = file.stat().st_mtime
        others = sorted((file for file in used if file != current), key=used.__getitem__)
        for file in others[: max(0, len(others) + 1 - self.keep)]:
            with suppress(OSError):  # deleted already, or open on a system that keeps such files
                file.unlink()
        remove_unfinished(self.folder, STALE_AFTER_S)


def _is_final(error: Exception) -> bool:
    """Whether a further attempt would fail alike."""
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
    """What has arrived, at most 1 MiB: a slow server must not keep a read waiting until that is full."""
    block: bytes = stream.read1(_BLOCK) if hasattr(stream, "read1") else stream.read(_BLOCK)
    return block


def _ends_as_tar(file: Path) -> bool:
    """Whether a file ends in the two blocks of zeros, or more, that end a tar."""
    with file.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - 1024))
        return size % 512 == 0 and stream.read() == bytes(1024)


def _is_http(url: str) -> bool:
    """By the standard library: fsspec's HTTP needs aiohttp, and takes all files for unchanging."""
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
        raise InvalidArgument("shards", "URLs that fsspec reads", f"{scheme}:// ({error})") from error
    return files, path


def find_shards(patterns: Sequence[str], folder: Path, keep: int) -> list[Shard]:
    """The shards in the order of the patterns, those of a glob sorted.

    Args:
        patterns: paths, globs of paths, URLs; in each a range stands for all its numbers, with leading zeros
            where its first one has them, such as "train-{000..127}.tar".
        folder: where copies of those behind URLs are kept.
        keep: how many of them.

    Raises:
        InvalidArgument: for no patterns, a pattern that matches no file, or a range that falls.
    """
    if isinstance(patterns, str) or not patterns:
        raise InvalidArgument("shards", "a list of at least one path or URL", repr(patterns))
    found: list[Shard] = []
    for pattern in patterns:
        # A file whose name looks like a range or a pattern is that file.
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
        raise InvalidArgument("shards", "a rising range", f"{found.group()} in '{pattern}'")
    before = pattern[: found.start()]
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [before + number + end for number in numbers for end in after]


def _expand_glob(path: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    # Brackets are part of many names of folders, and seldom meant as a pattern.
    for pattern in (path, path.replace("[", "[[]")):
        matches = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if matches:
            return matches
    reason = "which is a folder" if Path(path).is_dir() else "which matches no file"
    if Path(path).exists() and not Path(path).is_dir():
        reason = "which is not a regular file"
    raise InvalidArgument("shards", "tar files", f"'{path}', {reason}")
