"""The samples of each step, a pure function of (seed, step), read in advance by other processes."""

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

_BATCHES = 0  # the first word of the key for shuffling batches; those for shuffling buckets are 1, 2, ...


class SampleOrder:
    """The samples of every optimizer step. All are from the same bucket and so have the same shape.

    A bucket's samples are shuffled in every epoch and form an endless sequence over all epochs, which is cut
    into batches of `global_batch_size`. A batch belongs to the epoch in which it becomes complete. An epoch's
    batches are shuffled across buckets. So every sample is read equally often, and none is dropped.

    Args:
        buckets: index of each sample in the dataset -> its bucket, any hashable value.
        global_batch_size: samples per optimizer step, over all processes and accumulation steps.
        seed: the run's seed.
        groups: index -> group of samples to be read close together, such as the samples of a shard: groups
            are shuffled, and so are the samples within each. None for no groups.

    Raises:
        InvalidArgument: if a batch is larger than the dataset.
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
        """Return the sample indices of the optimizer step that follows `step` finished ones."""
        epoch = self.epoch_of(step)
        bucket, batch = self._epoch_batches(epoch)[step - self._batches_before(epoch)]
        positions = np.arange(batch * self.global_batch_size, (batch + 1) * self.global_batch_size)
        count = len(self._members[bucket])
        epochs, places = np.divmod(positions, count)
        rows = {int(e): self._shuffled(bucket, int(e)) for e in np.unique(epochs)}
        return np.array([rows[int(e)][place] for e, place in zip(epochs, places, strict=True)])

    def epoch_of(self, step: int) -> int:
        """Return the epoch of this step, from 0."""
        low, high = 0, 1
        while self._batches_before(high) <= step:
            high *= 2
        while high - low > 1:  # at most `step` batches are before `low`, and more than that before `high`
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        return low

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(indices) // self.global_batch_size for indices in self._members)

    def _shuffle_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The (bucket, batch of that bucket) pairs of an epoch, shuffled."""
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
        places: dict[Hashable, int] = {}  # groups in the order of their first samples
        for index in shuffled:
            places.setdefault(groups[int(index)], len(places))
        keys = [places[groups[int(index)]] for index in shuffled]
        return shuffled[np.argsort(keys, kind="stable")]


def permutation(count: int, key: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """Return the numbers below `count`, shuffled by `key`, using raw bits, which NumPy never changes."""
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
    """What was read for a position: its sample, or a replacement if that is unreadable."""

    position: Position
    index: int
    content: Any
    skipped: tuple[Skipped, ...] = ()


@runtime_checkable
class Reader(Protocol):
    """Reads a sample's content. It can be pickled for other processes."""

    def read(self, position: Position) -> Read:
        """Return the sample at a position, or its replacement."""


class Feed:
    """This process's share of every step's samples, in the parts of gradient accumulation.

    A step has the same samples however many processes and parts it is divided into.

    Args:
        order: the samples of each step.
        reader: reads a sample.
        batch_size: samples per part and process.
        parts: gradient accumulation steps.
        rank: index of this process, from 0.
        processes: number of processes that train together.
        workers: processes that read in advance for this one.
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
        """Yield the parts of a step. Consecutive steps are read in advance; any other step starts over."""
        if step != self._next_step:
            self._batches = iter(
                DataLoader(
                    _Positions(self.reader),
                    batch_sampler=_Steps(self, step),  # type: ignore[arg-type]  # typed for indices
                    num_workers=self.workers,
                    # As bytes: sending tensors would use a file descriptor for each.
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
        """Return this process's positions in a step, for each part."""
        indices = self.order.at(step)
        parts = []
        for part in range(self.parts):
            first = (part * self.processes + self.rank) * self.batch_size
            own = range(first, first + self.batch_size)
            parts.append([Position(int(indices[place]), step, place) for place in own])
        return parts


def raise_errors(items: Iterable[Any]) -> None:
    """Raise the first exception among the items that other processes returned.

    If it were raised there, its message would contain that process's traceback.
    """
    for item in items:
        if isinstance(item, Exception):
            raise item


def leave_ctrl_c_to_the_trainer(_: int) -> None:
    """Ignore Ctrl-C in processes that read in advance: the trainer needs them to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Steps:
    """All parts of all steps starting at `step`, endlessly."""

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
