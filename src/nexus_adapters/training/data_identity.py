"""Which data a run was started on, by content: to resume on the same, wherever it lies.

The record in the run's folder has a hash for each sample, so that what has changed can be put in words.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object

from nexus_adapters.data.conditioned import KnownHashes
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import write_json
from nexus_adapters.progress import progress

RECORD = "samples.json"
_HASHED_WHOLE = 10_000  # samples; of larger data sets only as many are hashed, evenly spaced
_DIGITS = 16  # of a hash, which are enough to tell samples apart


@dataclass(frozen=True)
class DataIdentity:
    """A data set, by content.

    Attributes:
        count: its samples.
        hashes: of the samples, in order, or of a part of them; empty for one that cannot be read.
    """

    count: int
    hashes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(json.dumps([self.count, self.hashes]).encode()).hexdigest()

    def change(self, now: DataIdentity) -> str:
        """What has changed since, in words; empty for nothing."""
        if self == now:
            return ""
        if self.count != now.count:
            return f"{_samples(now.count)} instead of {self.count:,}"
        if Counter(self.hashes) == Counter(now.hashes):
            return f"the same {_samples(self.count)} in another order"
        changed = sum(a != b for a, b in zip(self.hashes, now.hashes, strict=False))
        part = " that were compared" if len(self.hashes) < self.count else ""
        return f"{changed:,} of {_samples(len(self.hashes))}{part} changed"


def data_identity(
    source: Source,
    count: int,
    is_local: bool,
    known: KnownHashes | None = None,
    rank: int = 0,
    processes: int = 1,
) -> DataIdentity:
    """The identity of the first `count` samples. Each process hashes its share; all get the whole.

    Args:
        source: the data set.
        count: how many of its samples a run uses.
        is_local: whether samples can be read without a download; else their names and shards' versions count.
        known: hashes that earlier runs have kept.
        rank: of this process, from 0 on.
        processes: how many train together.
    """
    step = max(1, count // _HASHED_WHOLE)
    indices = range(0, count, step)[:_HASHED_WHOLE]
    mine = indices[rank::processes]
    shown = progress(mine, what="comparing samples", unit="sample", delay=2, shown=rank == 0)
    with nullcontext() if known is None else known.kept():
        found = [
            (index, _content_hash(source, index, known) if is_local else _name_hash(source, index))
            for index in shown
        ]
    if processes > 1:
        found = sorted(gather_object(found))
    return DataIdentity(count, tuple(digest for _, digest in found))


def _content_hash(source: Source, index: int, known: KnownHashes | None) -> str:
    try:
        found = source.content_hash(index) if known is None else known.content_hash(source, index)
    except BadSample:
        return ""
    return found[:_DIGITS]


def _name_hash(source: Source, index: int) -> str:
    version = source.version(index) if isinstance(source, TarSource) else ""
    named = f"{source.key(index)} {version}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(named).hexdigest()[:_DIGITS]


def check_same_data(folder: Path, now: DataIdentity) -> None:
    """`InvalidArgument` named "data" unless a run's folder records the same data, or nothing."""
    before = _recorded(folder)
    if before is not None and (change := before.change(now)):
        raise InvalidArgument(
            "data",
            f"the {_samples(before.count)} that the run in '{folder}' was started on",
            change,
            "Train in another folder; adapter.start_from continues from what this run has learned",
        )


def record_data(folder: Path, found: DataIdentity) -> None:
    """Keep the identity in the run's folder."""
    write_json(folder / RECORD, {"count": found.count, "hashes": found.hashes})


def _recorded(folder: Path) -> DataIdentity | None:
    """None where there is no record, or a damaged one: checkpoints have a hash of it, too."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        return DataIdentity(int(content["count"]), tuple(map(str, content["hashes"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"
