"""A tar written whole or not at all, the same bytes for the same members."""

from __future__ import annotations

import hashlib
import io
import tarfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from nexus_adapters.files import replacing


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
