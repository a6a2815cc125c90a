"""A tar written whole or not at all, the same bytes for the same members."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class ShardFile:
    """A tar that is written beside its place, and put there by `finish`.

    Args:
        path: where it goes.
        part: where it grows; an older one is overwritten.
    """

    def __init__(self, path: Path, part: Path) -> None:
        self.path, self.part, self.samples = path, part, 0
        self._file: BinaryIO = part.open("wb")
        self._hashed = _Hashed(self._file)
        self._tar = tarfile.open(fileobj=self._hashed, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, content: bytes) -> None:
        """Append a file of no time and no owner."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._tar.addfile(member, io.BytesIO(content))

    def finish(self) -> tuple[int, str]:
        """Put the tar in its place. Gives its size in bytes, and its SHA-256."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.part, self.path)
        return self._hashed.size, self._hashed.digest.hexdigest()

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # of a full disk, say, which is why it is abandoned
            self._tar.close()  # or it would write its end when it is collected
        self._file.close()
        self.part.unlink(missing_ok=True)


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
