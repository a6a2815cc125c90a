"""Errors are compared field by field, so that their wording can be improved without changing tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nexus_adapters.errors import MISSING, InvalidArgument


@contextmanager
def refused(
    name: str, received: object = None, *, expected: str = "", hint: str = ""
) -> Iterator[pytest.ExceptionInfo[InvalidArgument]]:
    """Expects an `InvalidArgument` for the argument `name`.

    `received`, `expected` and `hint` are texts that the fields must contain; `received=MISSING` is for an
    argument that was not given at all. Name what a user needs to see (a number, a path, a known name), not
    the sentence around it.
    """
    with pytest.raises(InvalidArgument) as caught:
        yield caught
    error = caught.value
    assert error.name == name, f"{error.name!r}: {error}"
    if received is MISSING:
        assert error.received is MISSING
    elif received is not None:
        assert str(received) in str(error.received), str(error)
    assert expected in error.expected, str(error)
    assert hint in error.hint, str(error)
