"""How far long work is: a bar on a terminal; elsewhere, such as in a log file, a line every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

EVERY_S = 30.0
_LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


def progress(
    items: Iterable[Any] | None = None, *, what: str, unit: str, shown: bool = True, **options: Any
) -> Any:
    """A `tqdm` bar, or lines in its place. What takes less than 30 seconds has no line.

    A postfix is set with `refresh=False`: it belongs to the next line, and is no reason for one.

    Args:
        items: to iterate over; None for a bar that the caller updates.
        what: is being done, such as "encoding".
        unit: of its parts, such as "sample".
        shown: False for nothing at all.
        options: of `tqdm`, such as `total`, `initial`, `delay`, `leave`.
    """
    from tqdm import tqdm  # here, since commands import this module before they check their arguments

    given = {"desc": what, "unit": unit, "disable": not shown, **options, **bar_options()}
    return tqdm(items, **given)


def bar_options() -> dict[str, Any]:
    """What makes lines of a `tqdm` bar, also of another library's; {} where stderr is a terminal."""
    if sys.stderr.isatty():
        return {}
    # `delay`: no line before. `miniters`: time alone decides when a line is due, not the speed so far.
    times = {"mininterval": EVERY_S, "delay": EVERY_S, "miniters": 0}
    return {"file": _Lines(), "bar_format": _LINE, **times}


class _Lines:
    """A stream to stderr that ends lines where a bar would return to their beginning, and repeats none."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        """Print a line, unless it is empty."""
        line = text.strip()
        if line not in ("", self._last):
            self._last = line
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing is kept back."""
