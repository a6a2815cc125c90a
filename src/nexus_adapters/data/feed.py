"""Samples in the order of the steps, read ahead by other processes where asked for."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader, Dataset

from nexus_adapters.data.order import SampleOrder


@dataclass(frozen=True)
class Place:
    """Where a sample is read: its index in the data set, the step, and its place in that step's samples."""

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
    """What came for a place: the sample, that of another index where this one's was unreadable."""

    place: Place
    index: int
    content: Any
    skipped: tuple[Skipped, ...] = ()


@runtime_checkable
class Reader(Protocol):
    """Gives a sample's content. Can be handed to other processes."""

    def read(self, place: Place) -> Read:
        """The sample at a place, or what stands in for it."""


class Feed:
    """This process's share of every step's samples, part by part.

    All of a step's samples are the same, however many processes and parts share it.

    Args:
        order: which samples each step reads.
        reader: how.
        batch_size: samples a part on one process.
        parts: of a step (gradient accumulation).
        rank: of this process, from 0 on.
        processes: how many there are.
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
                    _Places(self.reader),
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

    def places(self, step: int) -> list[list[Place]]:
        """This process's places in a step, part by part."""
        indices = self.order.at(step)
        parts = []
        for part in range(self.parts):
            first = (part * self.processes + self.rank) * self.batch_size
            own = range(first, first + self.batch_size)
            parts.append([Place(int(indices[place]), step, place) for place in own])
        return parts


def raise_errors(items: Iterable[Any]) -> None:
    """Raise the first exception among what other processes gave.

    Raised there, it would come with that process's traceback in its message.
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

    def __iter__(self) -> Iterator[Sequence[Place]]:
        step = self.first
        while True:
            yield from self.feed.places(step)
            step += 1


class _Places(Dataset[Read | Exception]):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, place: Place) -> Read | Exception:
        try:
            return self.reader.read(place)
        except (ValueError, OSError) as error:
            return error
