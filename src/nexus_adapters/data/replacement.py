"""Replace unreadable samples by the next readable one, and report each of them once, up to a limit."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nexus_adapters.data.feed import Skipped
from nexus_adapters.data.samples import BadSample
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import append_json_lines, lock, read_json_lines

Content = TypeVar("Content")


@dataclass(frozen=True)
class Replacement(Generic[Content]):
    """The sample that was read for a requested one.

    Attributes:
        index: index of the sample that was read: the requested one if it is readable.
        content: its content.
        skipped: the unreadable samples before it, starting with the requested one.
    """

    index: int
    content: Content
    skipped: tuple[Skipped, ...]


def read_or_replace(
    index: int, candidates: Sequence[int], read: Callable[[int], Content], key: Callable[[int], str]
) -> Replacement[Content]:
    """Read a sample or, if it is unreadable, the next readable candidate, wrapping around at the end.

    The result depends only on the dataset, not on what was read before or by which process.

    Args:
        index: index of the sample.
        candidates: possible replacements in ascending order, such as all samples of its bucket.
        read: reads a sample, or raises BadSample.
        key: returns a sample's name.

    Raises:
        InvalidArgument: if none can be read.
    """
    skipped: list[Skipped] = []
    for tried in _cycle(index, candidates):
        try:
            return Replacement(tried, read(tried), tuple(skipped))
        except BadSample as error:
            skipped.append(Skipped(tried, key(tried), str(error)))
    raise InvalidArgument(
        "data",
        "at least one readable sample",
        f"{len(skipped)} unreadable ones, the first of them '{skipped[0].key}' ({skipped[0].reason})",
    )


def _cycle(index: int, candidates: Sequence[int]) -> Iterator[int]:
    """The index, then the candidates after it, then those before it."""
    yield index
    place = bisect_right(candidates, index)
    for number in range(len(candidates)):
        other = candidates[(place + number) % len(candidates)]
        if other != index:
            yield other


class SkipReport:
    """Writes `skipped.jsonl`, one line per unreadable sample, for all processes and resumptions of a run.

    Args:
        file: the report, in a folder that the processes share.
        total: number of samples in the dataset.
        max_fraction: the largest fraction of them that may be unreadable.
    """

    def __init__(self, file: Path, total: int, max_fraction: float) -> None:
        self.file = file
        self.total = total
        self.max_fraction = max_fraction
        self.known = self._reported()

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Report new unreadable samples. Raises `InvalidArgument` if there are too many."""
        new = {each.index: each for each in skipped if each.index not in self.known}
        if not new:
            return
        with lock(self.file.with_name(f".{self.file.stem}.lock")):
            self.known = self._reported()  # also by other processes
            unreported = [each for index, each in new.items() if index not in self.known]
            append_json_lines(self.file, map(asdict, unreported))
        self.known |= set(new)
        if unreported:
            print(
                f"data: {len(self.known)} of {self.total} samples are unreadable and replaced by others: "
                f"'{self.file}'",
                file=sys.stderr,
            )
        if len(self.known) > self.max_fraction * self.total:
            first = next(iter(new.values()))
            raise InvalidArgument(
                "data.max_bad_fraction",
                f"at most {self.max_fraction:g} of {self.total} samples to be unreadable",
                f"{len(self.known)}, such as {first.key} ({first.reason})",
                f"'{self.file}' lists all of them",
            )

    def _reported(self) -> set[int]:
        return {row["index"] for row in read_json_lines(self.file, dict)}
