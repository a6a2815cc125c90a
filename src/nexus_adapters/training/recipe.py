"""Read and write recipes: TOML and `KEY=VALUE` settings <-> `TrainConfig`. Errors name the key."""

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
"""The format of the recipe in a run's folder. Version 1 had no number and one `[adapter]` for all methods."""

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
# Every recipe in a run's folder of version 1 has both of these; today no method has both.
_FIRST_ALONE = {"reads_prompt", "size_ratio"}


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """Load a recipe from a TOML file and apply settings such as "training.learning_rate=2e-5".

    `path` may also be the name of a recipe that ships with the package, such as "embedded-canny", or the
    recipe in a run's folder, also of an earlier version. The modules in its `imports` are imported.

    Raises:
        InvalidArgument: for a missing file, invalid TOML, a setting without "=", an unknown key (with the
            most similar known one), a wrong type, a value out of range, or values that contradict each other.
    """
    content = read_toml(recipe_file(path, "train", "RECIPE"), "RECIPE")
    section = content.get("adapter")
    is_first = isinstance(section, dict) and section.keys() >= _FIRST_ALONE
    content = _as_of_now(content, "RECIPE", path, 1 if is_first else FORMAT_VERSION)
    for setting in settings:
        apply_setting(content, setting, _types)
    return parse_config(content)


def read_toml(file: Path, argument: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        InvalidArgument: named `argument`, if the file is missing or is not valid TOML.
    """
    expect(file.is_file(), argument, "a TOML file", f"'{file}', which does not exist")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))  # Windows editors add a byte-order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "Save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InvalidArgument(argument, "valid TOML in UTF-8", f"'{file}' ({error})", hint) from error


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """Return nested mappings, such as parsed TOML, as a config. Raises `InvalidArgument` as `load_recipe`."""
    if isinstance(content.get("imports"), list | tuple):
        import_modules(map(str, content["imports"]), "imports")
    return validated(TrainConfig, content)


def load_run_recipe(path: Path) -> TrainConfig:
    """Load the recipe in a run's folder, of this or an earlier version.

    Its `imports` are not imported. The `InvalidArgument` for an unknown method says what to import.
    """
    return validated(TrainConfig, _as_of_now(read_toml(path, "output_dir"), "output_dir", path, 1))


def _as_of_now(content: dict[str, Any], argument: str, path: str | Path, version: int) -> dict[str, Any]:
    """A recipe in the current format. `version` is that of a recipe without a number."""
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
    """Return an `[adapter]` section of version 1 with its defaults, without options that have no effect."""
    whole = {**_FIRST_DEFAULTS, **section}
    known = {f.name for f in dataclasses.fields(find_method(whole["method"], "adapter.method").Options)}
    return {key: value for key, value in whole.items() if key in known}


def dump_config(config: TrainConfig) -> str:
    """Return the whole config as TOML from which `load_run_recipe` loads an equal one."""
    content = {FORMAT: FORMAT_VERSION, **_without_none(dataclasses.asdict(config))}
    return tomli_w.dumps(_with_lists(content))


def _without_none(content: Any) -> Any:
    """Leave out options that are None: TOML has no null, and they follow from other options."""
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content


def apply_setting(
    content: dict[str, Any], setting: str, types: Callable[[Sequence[str], str], set[Any]]
) -> None:
    """Set a key of nested tables, as `--set KEY=VALUE` does.

    Args:
        content: the tables; changed in place.
        setting: KEY=VALUE. The value is parsed as TOML if possible, else it is plain text.
        types: (sections, name) -> the types that the field may have; the value of a text field stays text.

    Raises:
        InvalidArgument: named "--set", for anything but KEY=VALUE and for a key that is not in a section.
    """
    key, equals, text = setting.partition("=")
    is_pair = bool(equals) and all(part.strip() for part in key.split("."))
    expect(is_pair, "--set", "KEY=VALUE, such as seed=4", repr(setting))
    *sections, name = (part.strip() for part in key.split("."))
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidArgument("--set", f"the name of a section before '.{name}'", repr(section))
    value = _value(text)
    is_text = not isinstance(value, str) and str in types(sections, name)  # a folder may be named 2024
    table[name] = text if is_text else value


def _types(sections: Sequence[str], name: str) -> set[Any]:
    """The types of a field; in `[adapter]`, those of all methods that have it."""
    if list(sections) == ["adapter"]:
        return {field_types(method.Options).get(name) for method in known_methods()}
    return {field_types(TrainConfig, sections).get(name)}


def _value(text: str) -> Any:
    """The value parsed as TOML, else as plain text, so paths need no quotes. Dates stay text."""
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
