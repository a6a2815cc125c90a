"""What a run was trained on, by content: its record says so, and evaluations and studies compare with it.

A sample is its image, its structure map where the data have one, and its captions, whatever its file is
called and wherever it lies. Scenes of the embedded world are left out: evaluations have others than training.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_adapters.adapter.saved import RUN_ADAPTER, RUN_RECORD
from nexus_adapters.data.conditioned import KnownHashes
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.progress import progress
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.recipe_samples import known_hashes_file, open_training_source

_BYTES = 8  # of a sample's SHA-256: among a million trained ones a new one is found by chance once in 10^13
_TRAINED, _DATA = "trained_on", "data_sha256"  # in a run's record
_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class TrainedOn:
    """What a run's record says.

    Attributes:
        samples: the beginning of each trained sample's content hash.
        data_sha256: as `data_sha256` gave it.
    """

    samples: frozenset[bytes]
    data_sha256: str

    def has(self, content_hash: str) -> bool:
        """Whether the run was trained on a sample with this content."""
        return _short(content_hash) in self.samples


def record_of(
    data: DataOptions,
    source: Source,
    order: SampleOrder,
    trained: Iterable[int],
    steps: int,
    cache_folder: Path,
) -> dict[str, Any]:
    """What a run adds to its record; {} for data that are not read as local files.

    Args:
        data: of the recipe.
        source: its samples.
        order: in which they were trained on.
        trained: the indices that may be trained on.
        steps: that the run takes.
        cache_folder: where content hashes are kept.
    """
    if not is_local(data):
        return {}
    indices = list(trained)
    if steps * order.global_batch_size < len(indices):
        indices = sorted({int(index) for step in range(steps) for index in order.at(step)})
    known = KnownHashes(known_hashes_file(data, cache_folder))
    with known.kept():
        shown = progress(indices, what="hashing samples", unit="sample", delay=2, leave=False)
        hashes = [_hash_of(source, index, known) for index in shown]
    shorts = sorted({_short(each) for each in hashes if each != _UNREADABLE})
    return {
        _TRAINED: base64.b64encode(b"".join(shorts)).decode(),
        _DATA: data_sha256(data, cache_folder),
    }


def read_record(path: Path) -> TrainedOn | None:
    """What the adapter in a folder, or that of a run's folder, was trained on; None where that is unknown."""
    for file in (path / RUN_RECORD, path / RUN_ADAPTER / RUN_RECORD):
        try:
            content: Mapping[str, Any] = json.loads(file.read_bytes())
            packed = base64.b64decode(content[_TRAINED], validate=True)
            sha256 = content[_DATA]
        except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of an earlier version
            continue
        parts = range(0, len(packed), _BYTES)
        return TrainedOn(frozenset(packed[part : part + _BYTES] for part in parts), str(sha256))
    return None


def data_sha256(data: DataOptions, cache_folder: Path, first: int = 0) -> str:
    """SHA-256 over the contents of all samples of `[data]` from `first` on, in their order.

    "" for what cannot be told without a download: scenes, data on the Hub or behind URLs, and data that are
    not on this machine.
    """
    if not is_local(data):
        return ""
    try:
        source = open_training_source(data, cache_folder)
    except InvalidArgument:
        return ""
    last = min(first + data.count, len(source)) if data.count else len(source)
    digest = hashlib.sha256()
    known = KnownHashes(known_hashes_file(data, cache_folder))
    with known.kept():
        indices = range(first, last)
        for index in progress(indices, what="hashing samples", unit="sample", delay=2, leave=False):
            digest.update(f"{_hash_of(source, index, known)}\n".encode())
    return digest.hexdigest()


def is_local(data: DataOptions) -> bool:
    """Whether all samples lie in files of this machine, or may do so."""
    is_far = data.kind == "table" and not Path(data.path).exists()
    return data.kind != "scenes" and not is_far and not any("://" in shard for shard in data.shards)


def _hash_of(source: Source, index: int, known: KnownHashes) -> str:
    try:
        return known.content_hash(source, index)
    except BadSample:
        return _UNREADABLE


def _short(content_hash: str) -> bytes:
    return bytes.fromhex(content_hash)[:_BYTES]
