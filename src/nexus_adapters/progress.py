"""Progress of long work: a bar on a terminal; elsewhere, such as in a log file, a line every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

EVERY_S = 30.0
_LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


def progress(
    items: Iterable[Any] | None = None, *, what: str, unit: str, shown: bool = True, **options: Any
) -> Any:
    """Return a `tqdm` bar, which prints lines if stderr is not a terminal, none within the first 30 seconds.

    Set a postfix with `refresh=False`, so that it does not print a line of its own.

    Args:
        items: to iterate over; None for a bar that the caller updates.
        what: the work, such as "encoding".
        unit: the unit of progress, such as "sample".
        shown: False to show nothing.
        options: further options of `tqdm`, such as `total`, `initial`, `delay`, `leave`.
    """
    from tqdm import tqdm  # here, because commands import this module before they check their arguments

    given = {"desc": what, "unit": unit, "disable": not shown, **options, **bar_options()}
    return tqdm(items, **given)


def bar_options() -> dict[str, Any]:
    """Return options that make a `tqdm` bar, also another library's, print lines; {} on a terminal."""
    if sys.stderr.isatty():
        return {}
    # `delay`: no line earlier. `miniters`: only time decides when a line is due, not the speed so far.
    times = {"mininterval": EVERY_S, "delay": EVERY_S, "miniters": 0}
    return {"file": _Lines(), "bar_format": _LINE, **times}


class _Lines:
    """A stream to stderr that prints each update of a bar as a new line, without repetitions."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        """Print a line, unless it is empty."""
        line = text.strip()
        if line not in ("", self._last):
            self._last = line
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Do nothing: `write` flushes."""
