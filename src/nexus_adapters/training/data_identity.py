"""Identify by content which samples a dataset has and which of them a run was trained on.

A sample is identified by its image, its structure map if the data have one, and its captions, not by its
path. So a run resumes on the same data after they were moved, and a study notices that its data have changed.
Evaluations compare only the images, and so recognize a trained one also with another caption or map.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from nexus_adapters.adapter.saved import RUN_ADAPTER, RUN_CHECKPOINTS, RUN_RECORD, find_saved
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.data.conditioned import KnownHashes
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.inspection import evenly_spaced
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import write_json
from nexus_adapters.progress import progress
from nexus_adapters.training.checkpoint import checkpoint_folders
from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.recipe_samples import known_hashes_file, open_training_source, samples_cache

RECORD = "samples.json"  # the data that a run was started on
TRAINED = "trained_on.json"  # the samples that it trains on
_HASHED_WHOLE = 10_000  # samples; of a larger dataset, this many evenly spaced ones are hashed
_DIGITS = 16  # of a SHA-256: two of a million samples collide by chance once in 10^7
_UNREADABLE = ""
_RESUME_HINT = "Train in a new output_dir; set adapter.start_from to this run to start from its weights"


@dataclass(frozen=True)
class DataIdentity:
    """The content of a dataset, as hashes.

    Attributes:
        count: number of samples.
        hashes: hashes of all samples, in order, or of evenly spaced ones; "" for an unreadable sample.
    """

    count: int
    hashes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every sample is hashed."""
        return len(self.hashes) == self.count

    @property
    def digest(self) -> str:
        """A hash of the count and all hashes."""
        return hashlib.sha256(json.dumps([self.count, self.hashes]).encode()).hexdigest()

    def change(self, now: DataIdentity) -> str:
        """Return what has changed in `now`, as text; empty if nothing has."""
        if self == now:
            return ""
        if self.count != now.count:
            return f"{_samples(now.count)} instead of {self.count:,}"
        if Counter(self.hashes) == Counter(now.hashes):
            return f"the same {_samples(self.count)} in another order"
        changed = sum(a != b for a, b in zip(self.hashes, now.hashes, strict=False))
        part = "" if self.is_whole else " that were compared"
        return f"{changed:,} of {_samples(len(self.hashes))}{part} changed"


def data_identity(
    source: Source,
    count: int,
    is_fetched: bool = False,
    known: KnownHashes | None = None,
    first: int = 0,
    rank: int = 0,
    processes: int = 1,
) -> DataIdentity:
    """Return the identity of `count` samples starting at `first`.

    Each process hashes its share; all get the whole result.

    Args:
        source: the dataset.
        count: how many of its samples are used.
        is_fetched: whether reading a sample downloads it; if so, names and shard versions are hashed instead.
        known: hashes that earlier runs have stored.
        first: index of the first sample.
        rank: index of this process, from 0.
        processes: number of processes that train together.
    """
    mine = evenly_spaced(range(first, first + count), _HASHED_WHOLE)[rank::processes]
    shown = progress(mine, what="comparing samples", unit="sample", delay=2, leave=False, shown=rank == 0)
    with nullcontext() if known is None else known.kept():
        found = [
            (index, _name_hash(source, index) if is_fetched else _hash(source, known, index))
            for index in shown
        ]
    if processes > 1:
        found = sorted(gather_object(found))
    return DataIdentity(count, tuple(digest for _, digest in found))


def identity_of_data(data: DataOptions, cache_folder: Path, first: int = 0) -> DataIdentity | None:
    """Return the identity of the samples in `[data]` starting at `first`, if they are available locally.

    None for data that are not available locally, and for scenes, which evaluations never share with training.
    """
    if data.kind == "scenes" or not data.is_local:
        return None
    try:
        source = open_training_source(data, cache_folder)
    except InvalidArgument:
        return None
    there = max(0, len(source) - first)
    count = min(data.count, there) if data.count else there
    return data_identity(source, count, known=KnownHashes(known_hashes_file(data, cache_folder)), first=first)


def check_data(
    config: TrainConfig, source: Source, count: int, rank: int = 0, processes: int = 1
) -> DataIdentity:
    """Return the identity of a recipe's data.

    Args:
        config: the recipe.
        source: its samples.
        count: how many of them are used.
        rank: index of this process, from 0.
        processes: number of processes that train together.

    Raises:
        InvalidArgument: if the run to be resumed was started on different data.
    """
    output = Path(config.output_dir)
    is_fetched = config.data.is_remote
    found = data_identity(source, count, is_fetched, _known(config), rank=rank, processes=processes)
    if checkpoint_folders(output / RUN_CHECKPOINTS):
        check_same_data(output, found)
    return found


def check_same_data(folder: Path, now: DataIdentity, hint: str = _RESUME_HINT) -> None:
    """Raise `InvalidArgument` named "data" if a run's folder records different data."""
    before = _recorded(folder)
    if before is not None and (change := before.change(now)):
        raise InvalidArgument(
            "data", f"the {_samples(before.count)} that the run in '{folder}' was started on", change, hint
        )


def record_data(folder: Path, found: DataIdentity) -> None:
    """Write the identity into the run's folder."""
    write_json(folder / RECORD, {"count": found.count, "hashes": found.hashes})


@dataclass(frozen=True)
class TrainedOn:
    """The samples an adapter was trained on, in its own run and in the runs it started from.

    Attributes:
        images: the first digits of the hash of each sample's image.
        is_complete: False if there may be other samples that are not recorded.
        reason: why it is not complete, as text; "" if unknown.
    """

    images: frozenset[str] = frozenset()
    is_complete: bool = True
    reason: str = field(default="", compare=False)

    def has(self, image_hash: str) -> bool:
        """Return whether a sample with this image is among them."""
        return image_hash[:_DIGITS] in self.images

    def and_before(self, other: TrainedOn) -> TrainedOn:
        """Return both combined."""
        is_complete, reason = self.is_complete and other.is_complete, self.reason or other.reason
        return TrainedOn(self.images | other.images, is_complete, reason)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON types, for a run's record."""
        packed = base64.b64encode(bytes.fromhex("".join(sorted(self.images)))).decode()
        record = {"images": packed, "is_complete": self.is_complete}
        return {"trained_on": record | ({"reason": self.reason} if self.reason else {})}


UNKNOWN = TrainedOn(is_complete=False)


def trained_on(config: TrainConfig, source: Source, order: SampleOrder, trained: Iterable[int]) -> TrainedOn:
    """Return the samples that a run trains on, including those of the adapter it starts from.

    Args:
        config: the recipe.
        source: its samples.
        order: the order in which they are trained on.
        trained: the indices that may be trained on.
    """
    output, start = Path(config.output_dir), config.adapter.start_from
    before: TrainedOn | None = TrainedOn()
    what = "the adapter that it started from"
    if checkpoint_folders(output / RUN_CHECKPOINTS):
        before, what = read_trained(output), "its beginning"  # includes those of the starting adapter
    elif start and not (config.base.path in BUNDLED and BUNDLED[config.base.path].has_adapter(start)):
        before = read_trained(find_saved(start, config.data.condition, config.base.path).path)
    own = TrainedOn()  # scenes: evaluations use different ones
    if config.data.is_remote:
        own = replace(UNKNOWN, reason="its data are on the Hub or at URLs")
    elif config.data.kind != "scenes":
        steps = config.training.max_train_steps
        own = _own_images(source, order, list(trained), steps, _known(config))
    if before is None:
        before = replace(UNKNOWN, reason=f"{what} has no record of the samples")
    return own.and_before(before)


def _own_images(
    source: Source, order: SampleOrder, indices: Sequence[int], steps: int, known: KnownHashes | None
) -> TrainedOn:
    if steps * order.global_batch_size < len(indices):
        indices = sorted({int(index) for step in range(steps) for index in order.at(step)})
    if known is None and len(indices) > _HASHED_WHOLE:  # too many to read again at every start
        reason = f"cache.enabled = false, and it has more than {_HASHED_WHOLE:,} samples"
        return replace(UNKNOWN, reason=reason)
    with nullcontext() if known is None else known.kept():
        shown = progress(indices, what="hashing images", unit="image", delay=2, leave=False)
        found = [_hash(source, known, index, of_image=True) for index in shown]
    return TrainedOn(frozenset(found) - {_UNREADABLE})


def read_trained(path: Path) -> TrainedOn | None:
    """Return what an adapter was trained on, or None if there is no record.

    `path` is the folder of an adapter, a run or a checkpoint.
    """
    run = path.parent.parent if path.parent.name == RUN_CHECKPOINTS else path
    for file in (run / TRAINED, run / RUN_RECORD, run / RUN_ADAPTER / RUN_RECORD):
        try:
            content = json.loads(file.read_bytes())["trained_on"]
            packed = base64.b64decode(content["images"], validate=True).hex()
            is_complete, reason = bool(content["is_complete"]), str(content.get("reason", ""))
        except (OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of an earlier version
            continue
        parts = range(0, len(packed), _DIGITS)
        return TrainedOn(frozenset(packed[part : part + _DIGITS] for part in parts), is_complete, reason)
    return None


def record_trained(folder: Path, found: TrainedOn) -> None:
    """Write it into the run's folder."""
    write_json(folder / TRAINED, found.as_json())


def _known(config: TrainConfig) -> KnownHashes | None:
    """The hashes stored in the cache; None without a cache."""
    if not config.cache.enabled:
        return None
    return KnownHashes(known_hashes_file(config.data, samples_cache(config.cache)))


def _hash(source: Source, known: KnownHashes | None, index: int, of_image: bool = False) -> str:
    """The hash of a whole sample or of its image; "" if it cannot be read."""
    try:
        if known is None:
            found = source.image_hash(index) if of_image else source.content_hash(index)
        else:
            found = known.image_hash(source, index) if of_image else known.content_hash(source, index)
    except BadSample:
        return _UNREADABLE
    return found[:_DIGITS]


def _name_hash(source: Source, index: int) -> str:
    version = source.version(index) if isinstance(source, TarSource) else ""
    named = f"{source.key(index)} {version}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(named).hexdigest()[:_DIGITS]


def _recorded(folder: Path) -> DataIdentity | None:
    """The recorded identity; None if it is missing or damaged, since checkpoints have a hash of it, too."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        return DataIdentity(int(content["count"]), tuple(map(str, content["hashes"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"
