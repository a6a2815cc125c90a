"""Validate nested mappings, such as parsed TOML, as a frozen config dataclass. Errors name the key."""

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
"""The pydantic config of the dataclasses that `validated` accepts."""

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
    """Return `content` as a config dataclass of type `kind`.

    Args:
        kind: the dataclass.
        content: nested mappings, as parsed from TOML.
        prefix: text to put before the key in errors, such as "adapter.".

    Raises:
        InvalidArgument: for the first invalid value; it names the key.
    """
    _check_text(content, prefix.removesuffix("."))
    try:
        # JSON, because strict validation of JSON accepts a table for a dataclass and a list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise _in_our_words(error, kind, prefix) from error


def _check_text(content: Any, key: str) -> None:
    """Raise `InvalidArgument` for text that is not valid Unicode or that contains a null character."""
    if isinstance(content, str) and ("\0" in content or not is_unicode(content)):
        raise InvalidArgument(key or "key", "text in UTF-8 without null characters", ascii(content))
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    for name, part in content.items() if isinstance(content, Mapping) else ():
        _check_text(name, key)
        _check_text(part, f"{key}.{name}".removeprefix("."))


def field_types(kind: type, sections: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a config's section with their types; empty if there is no such section."""
    types = get_type_hints(kind)
    for section in sections:
        part = types.get(section)
        types = get_type_hints(part) if dataclasses.is_dataclass(part) else {}
    return types


def unknown_key(key: str, known: Sequence[str]) -> InvalidArgument:
    """Return the error for an unknown key, which suggests the most similar known one."""
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {'.'.join(filter(None, [section, near[0]]))}?" if near else ""
    return InvalidArgument(
        key or '""', f"one of the keys {', '.join(known)}", "an unknown key", hint.rstrip(".")
    )


def _in_our_words(error: ValidationError, kind: type, prefix: str) -> InvalidArgument:
    """The first of pydantic's errors as an `InvalidArgument`."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = prefix + ".".join(location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(key, list(field_types(kind, location[:-1])))
    if location[-1:] == ["bool"]:  # the first of the types that an option of an extractor can have
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
    elif problem["type"] == "missing":  # an item of a list
        key, expected = prefix + ".".join(location[:-1]), "more values"
    elif expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return InvalidArgument(key, expected, repr(problem["input"]))
