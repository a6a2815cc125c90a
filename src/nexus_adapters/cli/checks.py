"""Checks of arguments that need nothing slow to import: a ValueError with argument, expected, received."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def expect(fits: bool, argument: str, expected: str, received: object) -> None:
    """Raise the ValueError unless `fits`."""
    if not fits:
        raise ValueError(f"{argument}: expected {expected}; received {received}")


@contextmanager
def names_as_options() -> Iterator[None]:
    """Let a ValueError of a function name an argument as users wrote it: `low` as `--low`."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if colon and name.isidentifier() and name.islower():
            raise ValueError(f"--{name.replace('_', '-')}:{rest}") from error
        raise


def expect_finite(argument: str, value: float) -> None:
    """Refuse infinities and what is not a number."""
    expect(math.isfinite(value), argument, "a finite number", value)


def expect_between(argument: str, value: int, low: int, high: int) -> None:
    """Refuse integers outside `low` to `high`, both included."""
    expect(low <= value <= high, argument, f"an integer from {low} to {high}", value)


def expect_side(argument: str, value: int | None) -> None:
    """Refuse an image side that latents cannot have. None, for a side not given, passes."""
    expect(value is None or (value > 0 and value % 8 == 0), argument, "a positive multiple of 8", value)


def expect_source(argument: str, value: str, file: str, what: str) -> None:
    """Refuse what is neither a folder that contains `file` nor could be the Hub id of `what`."""
    expected, folder = f"a folder or the Hub id of {what}", Path(value)
    if folder.is_dir():
        expect((folder / file).is_file(), argument, expected, f"'{value}', which has no {file}")
    elif folder.exists():
        expect(False, argument, expected, f"'{value}', which is a file")
    else:
        is_id = _HUB_ID.fullmatch(value) is not None
        expect(is_id, argument, expected, f"'{value}', which does not exist and is no Hub id")
