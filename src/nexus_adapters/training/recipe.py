"""Reading a recipe: TOML and `KEY=VALUE` settings into a `TrainConfig`, or one error that names the key."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from nexus_adapters.training.config import TrainConfig

Config = TypeVar("Config")

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


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a TOML file, with settings such as "training.learning_rate=2e-5" on top.

    Raises:
        ValueError: for a missing file, what is no TOML, a setting without "=", an unknown key (with the
            nearest right name), a wrong type, a value out of range, or values that do not agree.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"RECIPE: expected a TOML file; received '{file}', which does not exist")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"RECIPE: expected TOML; received '{file}' ({error})") from error
    for setting in settings:
        _apply(content, setting)
    return parse_config(content)


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """The config of nested mappings as TOML gives them; ValueError as `load_recipe`."""
    return validated(TrainConfig, content)


def validated(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """A config dataclass of nested mappings as TOML gives them. ValueError names the key."""
    try:
        # As JSON, in which strict validation takes a table for a dataclass and a list for a tuple.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise ValueError(_in_our_words(error, kind)) from error


def dump_config(config: TrainConfig) -> str:
    """The whole config as TOML that `load_recipe` reads back to an equal one."""
    return tomli_w.dumps(_with_lists(dataclasses.asdict(config)))


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ValueError(f"--set: expected KEY=VALUE, as in training.batch_size=4; received {setting!r}")
    *sections, name = (part.strip() for part in key.split("."))
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set: expected the name of a section before '.{name}'; received {section!r}")
    value = _value(text)
    is_text = not isinstance(value, str) and _types(sections).get(name) is str  # a folder may be called 2024
    table[name] = text if is_text else value


def _value(text: str) -> Any:
    """As TOML has it, else the plain text: paths need no quotes. A date stays text: no field is one."""
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    is_one = set(value) == {"value"} and not isinstance(value["value"], datetime.date | datetime.time)
    return value["value"] if is_one else text


def _with_lists(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_lists(value) for key, value in content.items()}
    return list(map(_with_lists, content)) if isinstance(content, tuple) else content


def _in_our_words(error: ValidationError, kind: type) -> str:
    """The first problem: key, expected, received."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(location, kind)
    if location[-1:] == ["bool"]:  # the first of the types that an extractor's option may have
        key = ".".join(location[:-1])
        return f"{key}: expected a number, true, false or a string; received {problem['input']!r}"
    if problem["type"] == "value_error":  # from __post_init__, which names the key itself
        return str(problem["ctx"]["error"])
    expected = problem["msg"].removeprefix("Input should be ")
    if problem["type"] in _TYPES:
        expected = _TYPES[problem["type"]]
    elif problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        return f"{key}: expected a value; received none"
    elif problem["type"] == "missing":  # one of a list's
        key, expected = ".".join(location[:-1]), "more values"
    elif expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{key}: expected {expected}; received {problem['input']!r}"


def _unknown_key(location: Sequence[str], kind: type) -> str:
    *sections, name = location
    known = _types(sections, kind)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    expected = f"{'.'.join([*sections, near[0]])}?" if near else f"one of {', '.join(known)}"
    meant = f"did you mean {expected}" if near else f"expected {expected}"
    return f"{'.'.join(location)}: no such key; {meant}"


def _types(sections: Sequence[str], kind: type = TrainConfig) -> dict[str, Any]:
    """The fields of a section and their types; none where there is no such section."""
    types = get_type_hints(kind)
    for section in sections:
        part = types.get(section)
        types = get_type_hints(part) if dataclasses.is_dataclass(part) else {}
    return types
