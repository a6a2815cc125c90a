"""Columns of a data set: which are there, and what a caption may be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from nexus_adapters.errors import InvalidArgument


def no_column(argument: str, wanted: str, present: Iterable[object], where: str) -> InvalidArgument:
    """The error that `wanted` is not among the columns that are there; it lists them, the nearest apart."""
    names = [str(name) for name in present]
    near = get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else ""
    there = ", ".join(names) or "none"
    return InvalidArgument(argument, f"a column of {where} ({there})", f"'{wanted}'", hint)


def as_captions(value: object) -> tuple[str, ...] | None:
    """The captions of a string or of a list of strings, at least one; None for anything else."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(caption, str) for caption in value):
        return tuple(value)
    return None
