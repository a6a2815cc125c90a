"""Ignored files and rows of a dataset, counted by reason and reported in a single line."""

from __future__ import annotations

import warnings
from collections import defaultdict

_NAMED = 3  # files of each reason that the report names


class Ignored:
    """Collects names by reason, such as "captions without an image"."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, reason: str, name: str) -> None:
        """Count one more file or row under a reason."""
        self._counts[reason] += 1
        if len(self._names[reason]) < _NAMED:
            self._names[reason].append("".join(c if c.isprintable() else "?" for c in name))

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        """Such as "captions without an image: 2 (a.txt, b.txt); ...", largest first; "" for nothing."""
        parts = []
        for reason, count in sorted(self._counts.items(), key=lambda pair: -pair[1]):
            more = ", ..." if count > _NAMED else ""
            parts.append(f"{reason}: {count:,} ({', '.join(self._names[reason])}{more})")
        return "; ".join(parts)

    def report(self, place: object, stacklevel: int = 2) -> None:
        """Warn once about all that has been counted."""
        if self:
            warnings.warn(f"'{place}': ignored {self}", stacklevel=stacklevel + 1)
