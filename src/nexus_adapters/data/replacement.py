"""What stands in for a sample that cannot be read: the next one that can be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nexus_adapters.data.feed import Skipped
from nexus_adapters.data.samples import BadSample
from nexus_adapters.errors import InvalidArgument

Content = TypeVar("Content")


@dataclass(frozen=True)
class Replacement(Generic[Content]):
    """What was read in the end.

    Attributes:
        index: of the sample that was read; the one asked for where that is readable.
        content: what reading gave.
        skipped: the samples that could not be read on the way, the one asked for first.
    """

    index: int
    content: Content
    skipped: tuple[Skipped, ...]


def read_or_replace(
    index: int, candidates: Sequence[int], read: Callable[[int], Content], key: Callable[[int], str]
) -> Replacement[Content]:
    """Read a sample, or else the next readable one of the candidates, the first one after the last.

    The answer depends on the data set alone, not on what was read before or by which process.

    Args:
        index: of the sample.
        candidates: what may stand in for it, in ascending order, such as all samples of its bucket.
        read: gives a sample, or raises BadSample.
        key: names a sample.

    Raises:
        InvalidArgument: where none can be read.
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
        f"{len(skipped)} unreadable ones, the first '{skipped[0].key}' ({skipped[0].reason})",
    )


def _cycle(index: int, candidates: Sequence[int]) -> Iterator[int]:
    """The index, then the candidates after it, then those before it. Most often the first is the answer."""
    yield index
    place = bisect_right(candidates, index)
    for number in range(len(candidates)):
        other = candidates[(place + number) % len(candidates)]
        if other != index:
            yield other
