"""Samples that cannot be read: each reported once, and no more of them than the recipe allows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from nexus_adapters.data.feed import Skipped
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import append_json_lines, lock, read_json_lines


class SkipReport:
    """Keeps `skipped.jsonl`, a line a sample, over all sittings of a run and for all its processes.

    Args:
        file: the report, in a folder that the processes share.
        total: samples in the data set.
        max_fraction: of them may be unreadable.
    """

    def __init__(self, file: Path, total: int, max_fraction: float) -> None:
        self.file = file
        self.total = total
        self.max_fraction = max_fraction
        self.known = self._reported()

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Report those that are new. InvalidArgument when they are too many."""
        new = {each.index: each for each in skipped if each.index not in self.known}
        if not new:
            return
        with lock(self.file.with_name(f".{self.file.stem}.lock")):
            self.known = self._reported()  # by other processes, too
            untold = [each for index, each in new.items() if index not in self.known]
            append_json_lines(self.file, map(asdict, untold))
        self.known |= set(new)
        if untold:
            print(
                f"data: {len(self.known)} of {self.total} samples cannot be read, others stand in for them: "
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
