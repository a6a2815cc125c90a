"""The error for bad input: which argument, what was expected, what was received, and what to do about it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Final

# One slash, too: that is what `Path` makes of two. One letter is a drive.
_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]+:/{1,2})(?:[^\s/?#]*@)?([^\s'\"<>?#]*)(?:\?[^\s'\"<>]*)?")
# What changes a terminal's state or the order of letters: controls, surrogates, directions, line separators.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def redacted(text: str) -> str:
    """A text whose URLs have no user, password or query, where secrets and signatures are."""
    return _URL.sub(r"\1\2", text)


def shown(text: str) -> str:
    """A text as users may see it: `redacted`, and with control characters as escapes."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], redacted(text))


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"  # one object, also in errors that come from other processes


MISSING: Final = _Missing()
"""The value of `InvalidArgument.received` where nothing was given."""


class InvalidArgument(ValueError):  # noqa: N818  # a public name; argparse, click and pydantic drop "Error" here too
    """An argument, option or recipe key that cannot be used.

    Renders as `NAME: expected EXPECTED, got RECEIVED. HINT`, or as `NAME is required. HINT` where nothing was
    given.

    Args:
        name: of the argument, as the caller of the function knows it, such as "condition".
        expected: what would have been right, in words, such as "a positive integer".
        received: what was given, as a user should read it: `repr` of a value, or a description of it, such as
            "shape (2, 3)". `MISSING` where nothing was given.
        hint: what to do about it, without the full stop; "" for nothing.
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
        """The one line that users see."""
        if self.received is MISSING:
            text = f"{self.name} is required"
        else:
            text = f"{self.name}: expected {self.expected}, got {self.received}"
        return shown(f"{text}. {self.hint}" if self.hint else text)

    def with_name(self, name: str) -> InvalidArgument:
        """The same error for an argument of another name, as in a command whose option sets the argument."""
        return type(self)(name, self.expected, self.received, self.hint)


def expect(fits: bool, name: str, expected: str, received: object = MISSING, hint: str = "") -> None:
    """Raise `InvalidArgument` unless `fits`."""
    if not fits:
        raise InvalidArgument(name, expected, received, hint)


@contextmanager
def renamed(names: Mapping[str, str] | Callable[[str], str]) -> Iterator[None]:
    """Let an `InvalidArgument` that passes through name what the user wrote, such as `low` as `--low`.

    Args:
        names: argument -> the name that the user knows it by; those not in it keep theirs. Or a function that
            gives it.
    """
    try:
        yield
    except InvalidArgument as error:
        name = names.get(error.name, error.name) if isinstance(names, Mapping) else names(error.name)
        if name == error.name:
            raise
        raise error.with_name(name) from error


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8. Bytes that could not be decoded are lone surrogates in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_utf8(text: str) -> str:
    """Text with what UTF-8 cannot encode replaced: file names have any bytes, and JSON lone surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def mentions(error: BaseException, words: Iterable[str]) -> bool:
    """Whether a library's message has one of these words: torch and OpenCV have no class for what they mean.

    Nothing else decides by a message's text: all else goes by an error's class and fields.
    """
    text = str(error).lower()
    return any(word in text for word in words)


def one_line(error: BaseException, most: int = 300) -> str:
    """What a library's error says, in one line of at most `most` characters; its kind where it says nothing.

    Libraries add pages of hints in further paragraphs, so the first one counts.
    """
    text = " ".join(shown(str(error)).strip().partition("\n\n")[0].split())
    return text[:most] if text else type(error).__name__


# Hooks are called through these.
_NOT_THE_USERS = (__name__.partition(".")[0], "torch", "diffusers", "transformers")


def warn_caller(message: str) -> None:
    """A `UserWarning` at the line outside of this package and its libraries that led here."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def code_hint(error: BaseException) -> str:
    """What to do where a library refuses a model because of the Python code in its folder; "" otherwise."""
    if not mentions(error, ("trust_remote_code", "custom code")):
        return ""
    return (
        "The package never runs code that ships with a model. Use a model that its library supports by itself"
    )
