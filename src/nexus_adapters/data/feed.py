"""Samples in the order of the steps, a pure function of (seed, step), read ahead by other processes."""

from __future__ import annotations

import pickle
import signal
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from nexus_adapters.errors import InvalidArgument

_BATCHES = 0  # the first word of the key that batches are shuffled by; buckets' own are 1, 2, ...


class SampleOrder:
    """Every optimizer step's samples, all of one bucket, so that they share a shape.

    A bucket's samples are shuffled anew in every epoch and read as one endless row; each `global_batch_size`
    of them, counted over all epochs, are a batch, which belongs to the epoch in which it becomes complete.
    An epoch's batches are shuffled across buckets. So every sample is read equally often, and none is
    dropped.

    Args:
        buckets: index of each sample in the dataset -> what identifies its bucket.
        global_batch_size: samples an optimizer step, over all processes and accumulated parts.
        seed: of the run.
        groups: index -> what identifies the group of samples that are to be read close together, such as
            those of a shard: groups are shuffled, and the samples within each. None for no groups.

    Raises:
        InvalidArgument: where a batch is larger than the dataset.
    """

    def __init__(
        self,
        buckets: Mapping[int, Hashable],
        global_batch_size: int,
        seed: int,
        groups: Mapping[int, Hashable] | None = None,
    ) -> None:
        if global_batch_size > len(buckets):
            raise InvalidArgument(
                "training.batch_size",
                f"at most {len(buckets)} samples per optimizer step, the size of the dataset",
                global_batch_size,
            )
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index, bucket in buckets.items():
            members[bucket].append(index)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.groups = groups
        self._members = [np.array(indices) for indices in members.values()]  # in order of first appearance
        self._shuffled = lru_cache(maxsize=8 + 2 * len(self._members))(self._shuffle_bucket)
        self._epoch_batches = lru_cache(maxsize=2)(self._shuffle_epoch)

    def at(self, step: int) -> Int[np.ndarray, " global_batch"]:
        """The indices of the samples of the optimizer step that follows `step` finished ones."""
        epoch = self.epoch_of(step)
        bucket, batch = self._epoch_batches(epoch)[step - self._batches_before(epoch)]
        positions = np.arange(batch * self.global_batch_size, (batch + 1) * self.global_batch_size)
        count = len(self._members[bucket])
        epochs, places = np.divmod(positions, count)
        rows = {int(e): self._shuffled(bucket, int(e)) for e in np.unique(epochs)}
        return np.array([rows[int(e)][place] for e, place in zip(epochs, places, strict=True)])

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0 on, that this step belongs to."""
        low, high = 0, 1
        while self._batches_before(high) <= step:
            high *= 2
        while high - low > 1:  # the batches before `low` are at most `step`, those before `high` more
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        return low

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(indices) // self.global_batch_size for indices in self._members)

    def _shuffle_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The epoch's (bucket, batch of that bucket), shuffled."""
        batches = [
            (bucket, batch)
            for bucket, indices in enumerate(self._members)
            for batch in range(
                epoch * len(indices) // self.global_batch_size,
                (epoch + 1) * len(indices) // self.global_batch_size,
            )
        ]
        return [batches[int(place)] for place in permutation(len(batches), (self.seed, _BATCHES, epoch))]

    def _shuffle_bucket(self, bucket: int, epoch: int) -> Int[np.ndarray, " n"]:
        indices = self._members[bucket]
        shuffled: np.ndarray = indices[permutation(len(indices), (self.seed, 1 + bucket, epoch))]
        if self.groups is None:
            return shuffled
        groups = self.groups
        places: dict[Hashable, int] = {}  # groups in the order in which their first samples come up
        for index in shuffled:
            places.setdefault(groups[int(index)], len(places))
        keys = [places[groups[int(index)]] for index in shuffled]
        return shuffled[np.argsort(keys, kind="stable")]


def permutation(count: int, key: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """The numbers below `count`, shuffled by `key`: from raw bits, which NumPy never changes."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(np.asarray(bits), kind="stable")


@dataclass(frozen=True)
class Position:
    """Where a sample is read: its index in the dataset, the step, and its place in that step's samples."""

    index: int
    step: int
    place: int


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and why."""

    index: int
    key: str
    reason: str


@dataclass(frozen=True)
class Read:
    """What was read for a position: its sample, or another one where that is unreadable."""

    position: Position
    index: int
    content: Any
    skipped: tuple[Skipped, ...] = ()


@runtime_checkable
class Reader(Protocol):
    """Gives a sample's content. Can be handed to other processes."""

    def read(self, position: Position) -> Read:
        """The sample at a position, or what replaces it."""


class Feed:
    """This process's share of every step's samples, part by part.

    All of a step's samples are the same, however many processes and parts share it.

    Args:
        order: which samples each step reads.
        reader: how.
        batch_size: samples a part on one process.
        parts: of a step (gradient accumulation).
        rank: of this process, from 0 on.
        processes: how many train together.
        workers: processes that read ahead for this one.
    """

    def __init__(
        self,
        order: SampleOrder,
        reader: Reader,
        batch_size: int,
        parts: int,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        assert order.global_batch_size == batch_size * parts * processes
        self.order = order
        self.reader = reader
        self.batch_size = batch_size
        self.parts = parts
        self.rank = rank
        self.processes = processes
        self.workers = workers
        self._next_step = -1
        self._batches: Iterator[list[Read] | bytes] = iter(())

    def step(self, step: int) -> Iterator[list[Read]]:
        """The parts of a step. Steps in a row are read ahead; any other step starts anew."""
        if step != self._next_step:
            self._batches = iter(
                DataLoader(
                    _Positions(self.reader),
                    batch_sampler=_Steps(self, step),  # type: ignore[arg-type]  # typed for indices
                    num_workers=self.workers,
                    # As bytes: each tensor by itself would take up a file descriptor on its way.
                    collate_fn=pickle.dumps if self.workers else list,
                    worker_init_fn=leave_ctrl_c_to_the_trainer,
                )
            )
        self._next_step = step + 1
        for _ in range(self.parts):
            batch = next(self._batches)
            reads = pickle.loads(batch) if isinstance(batch, bytes) else batch
            raise_errors(reads)
            yield reads

    def positions(self, step: int) -> list[list[Position]]:
        """This process's positions in a step, part by part."""
        indices = self.order.at(step)
        parts = []
        for part in range(self.parts):
            first = (part * self.processes + self.rank) * self.batch_size
            own = range(first, first + self.batch_size)
            parts.append([Position(int(indices[place]), step, place) for place in own])
        return parts


def raise_errors(items: Iterable[Any]) -> None:
    """Raise the first exception among what other processes returned.

    Raised there, its message would contain that process's traceback.
    """
    for item in items:
        if isinstance(item, Exception):
            raise item


def leave_ctrl_c_to_the_trainer(_: int) -> None:
    """For processes that read ahead: the trainer finishes its step, and needs them for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Steps:
    """All parts of all steps from one on, without an end."""

    def __init__(self, feed: Feed, step: int) -> None:
        self.feed, self.first = feed, step

    def __iter__(self) -> Iterator[Sequence[Position]]:
        step = self.first
        while True:
            yield from self.feed.positions(step)
            step += 1


class _Positions(Dataset[Read | Exception]):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, position: Position) -> Read | Exception:
        try:
            return self.reader.read(position)
        except (ValueError, OSError) as error:
            return error
