"""Tar shards behind URLs: fetched whole, so that any server will do, and a few of them kept."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import ABANDONED_S, lock, remove_unfinished, replacing

_TIMEOUT_S = 60.0
_WAITS_S = (1.0, 4.0)  # before the second and the third attempt
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")  # fsspec's names


class RemoteShard:
    """A file behind a URL, http(s) or any kind that fsspec reads (s3, hf, gs, ...).

    Args:
        url: of the file.
        folder: where fetched files are kept, for all processes of this machine; made when it is needed.
        keep: how many; the least recently used go.
    """

    def __init__(self, url: str, folder: Path, keep: int) -> None:
        self.place, self.folder, self.keep = url, folder, keep
        parts = urlsplit(url)  # signed URLs have their secret in the query, others before the host
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def version(self) -> str | None:
        """Size and ETag, or what else the server has; None where it does not answer."""
        try:
            return _http_version(self.place) if _is_http(self.place) else _fsspec_version(self.place)
        except InvalidArgument:
            raise
        except Exception:  # what lies below fsspec has errors of its own
            return None

    def open(self, version: str) -> io.FileIO:
        """The file, fetched where it is not kept.

        Raises:
            InvalidArgument: where the server refuses it, or a package for such URLs is missing.
            OSError: where it cannot be reached, after three attempts.
        """
        name = hashlib.sha256(f"{self.place}\n{version}".encode()).hexdigest()
        file = self.folder / f"{name[:32]}.tar"
        while True:  # another process may let go of the file before it is open
            with suppress(FileNotFoundError):
                os.utime(file)
                return io.FileIO(file)
            self._fetch(file)

    def _fetch(self, file: Path) -> None:
        with lock(file.with_suffix(".lock")):  # several readers want a shard at the same time
            if not file.exists():
                self._download(file)
        self._let_go(file)

    def _download(self, file: Path) -> None:
        for wait in (*_WAITS_S, None):
            try:
                with replacing(file) as out:
                    _copy_http(self.place, out) if _is_http(self.place) else _copy_fsspec(self.place, out)
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

    def _let_go(self, current: Path) -> None:
        used = {}
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process was faster
                used[file] = file.stat().st_mtime
        shards = sorted((file for file in used if file != current), key=used.__getitem__)
        for file in shards[: max(0, len(shards) + 1 - self.keep)]:
            with suppress(OSError):  # gone already, or open on a system that holds on to such files
                file.unlink()
        remove_unfinished(self.folder, ABANDONED_S)


def _is_final(error: Exception) -> bool:
    """Whether another attempt would be in vain."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # too slow, too often
    return isinstance(error, FileNotFoundError | PermissionError | ValueError)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _request(url: str, method: str) -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "nexus-adapters"})
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def _http_version(url: str) -> str:
    with _request(url, "HEAD") as response:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        return f"{response.headers.get('Content-Length')} {tag}"


def _copy_http(url: str, out: BinaryIO) -> None:
    """Not by fsspec, whose HTTP needs another package."""
    with _request(url, "GET") as response:
        shutil.copyfileobj(response, out, length=2**20)
        expected = response.headers.get("Content-Length")
    if expected is not None and int(expected) != out.tell():  # http.client says nothing of it
        raise OSError(f"the connection ended after {out.tell()} of {expected} bytes")


def _fsspec_version(url: str) -> str:
    files, path = _file_system(url)
    info = files.info(path)
    return f"{info.get('size')} {next((info[name] for name in _VERSIONS if info.get(name)), None)}"


def _copy_fsspec(url: str, out: BinaryIO) -> None:
    files, path = _file_system(url)
    with files.open(path, "rb") as remote:
        shutil.copyfileobj(remote, out, length=2**20)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package is missing, or no such kind of URL is known
        scheme = url.partition("://")[0]
        raise InvalidArgument("shards", "URLs that fsspec reads", f"{scheme}:// ({error})") from error
    return files, path
