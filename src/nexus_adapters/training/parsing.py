"""Nested mappings, as TOML gives them, into a frozen config dataclass, or one error that names the key."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nexus_adapters.errors import MISSING, InvalidArgument, is_unicode

Config = TypeVar("Config")
SECTION = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
"""Of the dataclasses that `validated` takes."""

_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
    "dataclass_exact_type": "a table",
}


def validated(kind: type[Config], content: Mapping[str, Any], prefix: str = "") -> Config:
    """A config dataclass of nested mappings. `InvalidArgument` names the key, with `prefix` before it."""
    _check_text(content, prefix.removesuffix("."))
    try:
        # As JSON, in which strict validation takes a table for a dataclass and a list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise _in_our_words(error, kind, prefix) from error


def _check_text(content: Any, key: str) -> None:
    """`InvalidArgument` for text that is no Unicode, as of a file name in another encoding, or has a null."""
    if isinstance(content, str) and ("\0" in content or not is_unicode(content)):
        raise InvalidArgument(key or "key", "text in UTF-8 without null characters", ascii(content))
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    for name, part in content.items() if isinstance(content, Mapping) else ():
        _check_text(name, key)
        _check_text(part, f"{key}.{name}".removeprefix("."))


def field_types(kind: type, sections: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a section of a config and their types; none where there is no such section."""
    types = get_type_hints(kind)
    for section in sections:
        part = types.get(section)
        types = get_type_hints(part) if dataclasses.is_dataclass(part) else {}
    return types


def unknown_key(key: str, known: Sequence[str]) -> InvalidArgument:
    """The error for a key that does not exist, with the nearest that does."""
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {'.'.join(filter(None, [section, near[0]]))}?" if near else ""
    return InvalidArgument(
        key or '""', f"one of the keys {', '.join(known)}", "an unknown key", hint.rstrip(".")
    )


def _in_our_words(error: ValidationError, kind: type, prefix: str) -> InvalidArgument:
    """The first problem."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = prefix + ".".join(location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(key, list(field_types(kind, location[:-1])))
    if location[-1:] == ["bool"]:  # the first of the types that an extractor's option may have
        key = prefix + ".".join(location[:-1])
        return InvalidArgument(key, "a number, true, false or a string", repr(problem["input"]))
    if problem["type"] == "value_error":  # from __post_init__
        found = problem["ctx"]["error"]
        if not isinstance(found, InvalidArgument):
            return InvalidArgument(key, "a valid value", f"{problem['input']!r} ({found})")
        return found.with_name(prefix + found.name)
    expected = problem["msg"].removeprefix("Input should be ")
    if problem["type"] in _TYPES:
        expected = _TYPES[problem["type"]]
    elif problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        return InvalidArgument(key, "a value", MISSING)
    elif problem["type"] == "missing":  # one of a list's
        key, expected = prefix + ".".join(location[:-1]), "more values"
    elif expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return InvalidArgument(key, expected, repr(problem["input"]))
