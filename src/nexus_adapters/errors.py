"""The error for invalid input: which argument, what was expected, what was received, and what to do."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final

# A single slash, too, because `Path` turns two into one. A single letter is a drive.
_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]+:/{1,2})(?:[^\s/?#]*@)?([^\s'\"<>?#]*)(?:\?[^\s'\"<>]*)?")
# Characters that change a terminal's state or the order of letters: control characters, surrogates,
# directional marks, line separators.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def redacted(text: str) -> str:
    """Return a text with user, password and query removed from its URLs, since these may be secrets."""
    return _URL.sub(r"\1\2", text)


def shown(text: str) -> str:
    """Return a text that is safe to print: `redacted`, and with control characters as escapes."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], redacted(text))


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"  # the same object after unpickling, in errors from other processes


MISSING: Final = _Missing()
"""The value of `InvalidArgument.received` if nothing was given."""


class InvalidArgument(ValueError):  # noqa: N818  # a public name; argparse, click and pydantic drop "Error" here too
    """An argument, option or recipe key has an invalid value.

    Renders as `NAME: expected EXPECTED, got RECEIVED. HINT`, or as `NAME is required. HINT` if nothing was
    given.

    Args:
        name: the argument's name, as the caller of the function knows it, such as "condition".
        expected: a valid value, in words, such as "a positive integer".
        received: the given value as a user should read it: its `repr`, or a description such as
            "shape (2, 3)". `MISSING` if nothing was given.
        hint: what to do about it, without a period; "" for no hint.
    """

    def __init__(
        self, name: str, expected: str = "a value", received: object = MISSING, hint: str = ""
    ) -> None:
        super().__init__(name, expected, received, hint)
        self.name = name
        self.expected = expected
        self.received = received
        self.hint = hint

    def __str__(self) -> str:
        """Return the one line that users see."""
        if self.received is MISSING:
            text = f"{self.name} is required"
        else:
            text = f"{self.name}: expected {self.expected}, got {self.received}"
        return shown(f"{text}. {self.hint}" if self.hint else text)

    def with_name(self, name: str) -> InvalidArgument:
        """Return the same error with another name, such as that of the option that sets the argument."""
        return type(self)(name, self.expected, self.received, self.hint)

    def with_names(self, names: Callable[[str], str]) -> InvalidArgument:
        """Return the same error with other names for its argument and for those that its texts mention."""
        received = mentioned(self.received, names) if isinstance(self.received, str) else self.received
        return type(self)(
            names(self.name), mentioned(self.expected, names), received, mentioned(self.hint, names)
        )


_MENTIONED = re.compile(r"`(\w+)`")


def mentioned(text: str, names: Callable[[str], str]) -> str:
    """Rename the arguments that a text mentions in backticks: "`start`" -> "--start".

    Arguments that `names` returns unchanged stay as they are.
    """

    def rename(found: re.Match[str]) -> str:
        name = names(found[1])
        return found[0] if name == found[1] else name

    return _MENTIONED.sub(rename, text)


def expect(fits: bool, name: str, expected: str, received: object = MISSING, hint: str = "") -> None:
    """Raise `InvalidArgument` unless `fits`."""
    if not fits:
        raise InvalidArgument(name, expected, received, hint)


def expect_finite(argument: str, value: float) -> None:
    """Raise `InvalidArgument` for infinities and NaN."""
    expect(math.isfinite(value), argument, "a finite number", value)


def expect_between(argument: str, value: int, low: int, high: int) -> None:
    """Raise `InvalidArgument` unless `low <= value <= high`."""
    expect(low <= value <= high, argument, f"an integer from {low} to {high}", value)


@contextmanager
def renamed(names: Mapping[str, str] | Callable[[str], str]) -> Iterator[None]:
    """Rename any `InvalidArgument` raised in the block to what the user wrote, such as `low` to `--low`.

    Arguments that its texts mention in backticks are renamed, too.

    Args:
        names: argument -> the user's name for it (other names stay), or a function that returns the new name.
    """
    try:
        yield
    except InvalidArgument as error:
        name_of = (lambda name: names.get(name, name)) if isinstance(names, Mapping) else names
        other = error.with_names(name_of)
        if other.args == error.args:
            raise
        raise other from error


def is_unicode(text: str) -> bool:
    """Return whether text can be encoded as UTF-8; bytes that could not be decoded are lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_utf8(text: str) -> str:
    """Return text with characters replaced that UTF-8 cannot encode, as in file names or JSON."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def mentions(error: BaseException, words: Iterable[str]) -> bool:
    """Return whether a library's error message has one of these words.

    Only for torch and OpenCV, which have no classes for these errors. Everywhere else, an error's class and
    fields decide.
    """
    text = str(error).lower()
    return any(word in text for word in words)


def one_line(error: BaseException, most: int = 300) -> str:
    """Return a library's error message as one line of at most `most` characters, or its class if it is empty.

    Only the first paragraph is used, since libraries add pages of hints after it.
    """
    text = " ".join(shown(str(error)).strip().partition("\n\n")[0].split())
    return text[:most] if text else type(error).__name__


# Hooks are called through these.
_NOT_THE_USERS = (__name__.partition(".")[0], "torch", "diffusers", "transformers")


def warn_caller(message: str) -> None:
    """Issue a `UserWarning` at the line of the user's code, outside this package and its libraries."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def code_hint(error: BaseException) -> str:
    """Return a hint if a library rejected a model because of the Python code in its folder; else ""."""
    if not mentions(error, ("trust_remote_code", "custom code")):
        return ""
    return (
        "The package never runs code that ships with a model. Use a model that its library supports natively"
    )
