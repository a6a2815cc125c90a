"""Reading and writing recipes: TOML and `KEY=VALUE` settings <-> `TrainConfig`. Errors name the key."""

from __future__ import annotations

import dataclasses
import datetime
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.methods import find_method, known_methods
from nexus_adapters.recipes import recipe_file
from nexus_adapters.registry import import_modules
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.parsing import field_types, validated

FORMAT, FORMAT_VERSION = "format_version", 2
"""Of the recipe that a run keeps. Version 1 had no number, and one `[adapter]` section for all methods."""

# Defaults of the methods' options in version 1.
_FIRST_DEFAULTS: dict[str, Any] = {
    "method": "prime",
    "residual": False,
    "zero_init": False,
    "groups": 0,
    "heads": 0,
    "head_width": 0,
    "noise_exponent": 0.0,
    "reads_prompt": True,
    "size_ratio": 0.125,
}
# Options that no method has together now, and that every recipe kept by a run of version 1 has.
_FIRST_ALONE = {"reads_prompt", "size_ratio"}


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a TOML file, overridden by settings such as "training.learning_rate=2e-5".

    `path` may also be the name of a recipe that ships with the package, such as "embedded-canny". Its
    `imports` are imported. The recipe that a run keeps is also one, of this or an earlier version.

    Raises:
        InvalidArgument: for a missing file, invalid TOML, a setting without "=", an unknown key (with the
            nearest known one), a wrong type, a value out of range, or values that contradict each other.
    """
    content = read_toml(recipe_file(path, "train", "RECIPE"), "RECIPE")
    section = content.get("adapter")
    is_first = isinstance(section, dict) and section.keys() >= _FIRST_ALONE
    content = _as_of_now(content, "RECIPE", path, 1 if is_first else FORMAT_VERSION)
    for setting in settings:
        apply_setting(content, setting, _types)
    return parse_config(content)


def read_toml(file: Path, argument: str) -> dict[str, Any]:
    """The content of a TOML file. `InvalidArgument` for `argument` if it is missing or not valid TOML."""
    expect(file.is_file(), argument, "a TOML file", f"'{file}', which does not exist")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # editors on Windows begin it with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "Save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InvalidArgument(argument, "valid TOML in UTF-8", f"'{file}' ({error})", hint) from error


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """The config of nested mappings, as TOML is read; `InvalidArgument` as `load_recipe`."""
    if isinstance(content.get("imports"), list | tuple):
        import_modules(map(str, content["imports"]), "imports")
    return validated(TrainConfig, content)


def load_run_recipe(path: Path) -> TrainConfig:
    """The config that a run keeps in its folder, of this or an earlier version.

    Nothing is imported for it. For an unknown method, `InvalidArgument` says what to import.
    """
    return validated(TrainConfig, _as_of_now(read_toml(path, "output_dir"), "output_dir", path, 1))


def _as_of_now(content: dict[str, Any], argument: str, path: str | Path, version: int) -> dict[str, Any]:
    """A recipe in the current format. `version`: of one without a number."""
    version = content.pop(FORMAT, version)
    expect(
        version in (1, FORMAT_VERSION),
        argument,
        f"a recipe of format version {FORMAT_VERSION} or older",
        f"version {version} in '{path}'",
        "Upgrade nexus-adapters",
    )
    section = content.get("adapter", {})
    if version == 1 and isinstance(section, Mapping):
        content["adapter"] = first_version_adapter(section)
    return content


def first_version_adapter(section: Mapping[str, Any]) -> dict[str, Any]:
    """An `[adapter]` section of version 1, completed, without the options that have no effect."""
    whole = {**_FIRST_DEFAULTS, **section}
    known = {f.name for f in dataclasses.fields(find_method(whole["method"], "adapter.method").Options)}
    return {key: value for key, value in whole.items() if key in known}


def dump_config(config: TrainConfig) -> str:
    """The whole config as TOML that `load_run_recipe` reads back to an equal one."""
    content = {FORMAT: FORMAT_VERSION, **_without_none(dataclasses.asdict(config))}
    return tomli_w.dumps(_with_lists(content))


def _without_none(content: Any) -> Any:
    """TOML has no null: options that are None follow from others, and are left out."""
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content


def apply_setting(
    content: dict[str, Any], setting: str, types: Callable[[Sequence[str], str], set[Any]]
) -> None:
    """Set a key of nested tables as `--set KEY=VALUE` says; `InvalidArgument` names --set.

    Args:
        content: the tables, which are changed.
        setting: KEY=VALUE. Its value is read as TOML, else as plain text.
        types: (sections, name) -> the types that the field may have; for one of text, the value stays text.
    """
    key, equals, text = setting.partition("=")
    is_pair = bool(equals) and all(part.strip() for part in key.split("."))
    expect(is_pair, "--set", "KEY=VALUE, as in seed=4", repr(setting))
    *sections, name = (part.strip() for part in key.split("."))
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidArgument("--set", f"the name of a section before '.{name}'", repr(section))
    value = _value(text)
    is_text = not isinstance(value, str) and str in types(sections, name)  # a folder may be called 2024
    table[name] = text if is_text else value


def _types(sections: Sequence[str], name: str) -> set[Any]:
    """The types of a field; in `[adapter]`, those of every method that has it."""
    if list(sections) == ["adapter"]:
        return {field_types(method.Options).get(name) for method in known_methods()}
    return {field_types(TrainConfig, sections).get(name)}


def _value(text: str) -> Any:
    """Parsed as TOML, else as plain text, so that paths need no quotes. Dates stay text: no field is one."""
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
