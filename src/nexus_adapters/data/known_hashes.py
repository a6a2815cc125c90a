"""Content hashes that need not be computed again: those of samples whose files are as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_adapters.data.samples import Source
from nexus_adapters.files import append_json_lines, read_json_lines

_KEPT_EVERY = 1000  # hashes, so that little is lost to a kill


class KnownHashes:
    """What samples' content hashes were, by `Source.stamp`, in a file that several processes may add to.

    A sample without a stamp is hashed every time. A file that is damaged, or missing, costs time alone.

    Args:
        file: JSON lines; its folder is made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = dict(_pairs(file))
        self._new: dict[str, str] = {}

    def content_hash(self, source: Source, index: int) -> str:
        """The hash of a sample's content: the known one, or computed. BadSample where it cannot be read."""
        stamp = source.stamp(index)
        if stamp is None:
            return source.content_hash(index)
        name = hashlib.sha256(stamp.encode()).hexdigest()[:32]
        if name not in self._known:
            self._known[name] = self._new[name] = source.content_hash(index)
            if len(self._new) >= _KEPT_EVERY:
                self.keep()
        return self._known[name]

    @contextmanager
    def kept(self) -> Iterator[KnownHashes]:
        """Keep what is computed inside, also where an error ends it."""
        try:
            yield self
        finally:
            self.keep()

    def keep(self) -> None:
        """Append what is new to the file. OSError where the disk is full."""
        if not self._new:
            return
        append_json_lines(self.file, self._new.items())
        self._new = {}


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for pair in read_json_lines(file, list):
        name, content_hash = pair if len(pair) == 2 else (None, None)
        if isinstance(name, str) and isinstance(content_hash, str) and len(content_hash) == 64:
            yield name, content_hash
