"""Which samples a data set has, and which of them a run was trained on, by content.

A sample is its image, its structure map where the data have one, and its captions, whatever its file is
called and wherever it lies. So a run resumes on the same data wherever they are, and studies notice that data
have changed. Evaluations compare the images alone: a trained one is known by another caption or map, too.
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
_HASHED_WHOLE = 10_000  # samples; of larger data sets only as many are hashed, evenly spaced
_DIGITS = 16  # of a SHA-256: among a million samples two have the same by chance once in 10^7
_UNREADABLE = ""
_RESUME_HINT = "Train in another folder; adapter.start_from continues from what this run has learned"


@dataclass(frozen=True)
class DataIdentity:
    """A data set, by content.

    Attributes:
        count: its samples.
        hashes: of the samples, in order, or of evenly spaced ones; "" for one that cannot be read.
    """

    count: int
    hashes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every sample has a hash."""
        return len(self.hashes) == self.count

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
    """The identity of `count` samples from `first` on. Each process hashes its share; all get the whole.

    Args:
        source: the data set.
        count: how many of its samples are used.
        is_fetched: whether reading a sample downloads it; then names and shards' versions count instead.
        known: hashes that earlier runs have kept.
        first: the first sample.
        rank: of this process, from 0 on.
        processes: how many train together.
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
    """The identity of the samples of `[data]` from `first` on, where all of them are on this machine.

    None for scenes, which no evaluation shares with a training, and for data that are not here.
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
    """What the data are; `InvalidArgument` where the run that would be resumed was started on others.

    Args:
        config: the recipe.
        source: its samples.
        count: how many of them are used.
        rank: of this process, from 0 on.
        processes: how many train together.
    """
    output = Path(config.output_dir)
    is_fetched = config.data.is_remote
    found = data_identity(source, count, is_fetched, _known(config), rank=rank, processes=processes)
    if checkpoint_folders(output / RUN_CHECKPOINTS):
        check_same_data(output, found)
    return found


def check_same_data(folder: Path, now: DataIdentity, hint: str = _RESUME_HINT) -> None:
    """`InvalidArgument` named "data" unless a run's folder records the same data, or nothing."""
    before = _recorded(folder)
    if before is not None and (change := before.change(now)):
        raise InvalidArgument(
            "data", f"the {_samples(before.count)} that the run in '{folder}' was started on", change, hint
        )


def record_data(folder: Path, found: DataIdentity) -> None:
    """Keep the identity in the run's folder."""
    write_json(folder / RECORD, {"count": found.count, "hashes": found.hashes})


@dataclass(frozen=True)
class TrainedOn:
    """The samples that an adapter was trained on, by the run that made it and those that it started from.

    Attributes:
        images: the beginning of the hash of each one's image.
        is_complete: False where there may be others, which nothing records.
        reason: why it is not complete, in words; "" where that is unknown.
    """

    images: frozenset[str] = frozenset()
    is_complete: bool = True
    reason: str = field(default="", compare=False)

    def has(self, image_hash: str) -> bool:
        """Whether a sample with this image is among them."""
        return image_hash[:_DIGITS] in self.images

    def and_before(self, other: TrainedOn) -> TrainedOn:
        """Both together."""
        is_complete, reason = self.is_complete and other.is_complete, self.reason or other.reason
        return TrainedOn(self.images | other.images, is_complete, reason)

    def as_json(self) -> dict[str, Any]:
        """For a run's record."""
        packed = base64.b64encode(bytes.fromhex("".join(sorted(self.images)))).decode()
        record = {"images": packed, "is_complete": self.is_complete}
        return {"trained_on": record | ({"reason": self.reason} if self.reason else {})}


UNKNOWN = TrainedOn(is_complete=False)


def trained_on(config: TrainConfig, source: Source, order: SampleOrder, trained: Iterable[int]) -> TrainedOn:
    """The samples that a run trains on, with those of the adapter that it starts from.

    Args:
        config: the recipe.
        source: its samples.
        order: in which they are trained on.
        trained: the indices that may be trained on.
    """
    output, start = Path(config.output_dir), config.adapter.start_from
    before: TrainedOn | None = TrainedOn()
    what = "the adapter that it started from"
    if checkpoint_folders(output / RUN_CHECKPOINTS):
        before, what = read_trained(output), "its beginning"  # which has those of the start, too
    elif start and not (config.base.path in BUNDLED and BUNDLED[config.base.path].has_adapter(start)):
        before = read_trained(find_saved(start, config.data.condition, config.base.path).path)
    own = TrainedOn()  # of scenes: evaluations have other ones, as for the adapters of the package
    if config.data.is_remote:
        own = replace(UNKNOWN, reason="its data are on the Hub or behind URLs")
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
    if known is None and len(indices) > _HASHED_WHOLE:  # too many to be read once more in each start
        reason = f"cache.enabled = false, and it has more than {_HASHED_WHOLE:,} samples"
        return replace(UNKNOWN, reason=reason)
    with nullcontext() if known is None else known.kept():
        shown = progress(indices, what="hashing images", unit="image", delay=2, leave=False)
        found = [_hash(source, known, index, of_image=True) for index in shown]
    return TrainedOn(frozenset(found) - {_UNREADABLE})


def read_trained(path: Path) -> TrainedOn | None:
    """What an adapter was trained on: one in a folder, a run's or a checkpoint's; None without a record."""
    run = path.parent.parent if path.parent.name == RUN_CHECKPOINTS else path
    for file in (run / TRAINED, run / RUN_RECORD, run / RUN_ADAPTER / RUN_RECORD):
        try:
            content = json.loads(file.read_bytes())["trained_on"]
            packed = base64.b64decode(content["images"], validate=True).hex()
            is_complete, reason = bool(content["is_complete"]), str(content.get("reason", ""))
        except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of an earlier version
            continue
        parts = range(0, len(packed), _DIGITS)
        return TrainedOn(frozenset(packed[part : part + _DIGITS] for part in parts), is_complete, reason)
    return None


def record_trained(folder: Path, found: TrainedOn) -> None:
    """Keep it in the run's folder."""
    write_json(folder / TRAINED, found.as_json())


def _known(config: TrainConfig) -> KnownHashes | None:
    """The hashes that the cache keeps; None without a cache."""
    if not config.cache.enabled:
        return None
    return KnownHashes(known_hashes_file(config.data, samples_cache(config.cache)))


def _hash(source: Source, known: KnownHashes | None, index: int, of_image: bool = False) -> str:
    """Of the whole sample or of its image; "" for one that cannot be read."""
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
    """None where there is no record, or a damaged one: checkpoints have a hash of it, too."""
    try:
        content = json.loads((folder / RECORD).read_bytes())
        return DataIdentity(int(content["count"]), tuple(map(str, content["hashes"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"
