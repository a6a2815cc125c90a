"""Reading a recipe: TOML and `KEY=VALUE` settings into a `TrainConfig`, or one error that names the key."""

from __future__ import annotations

import dataclasses
import datetime
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.methods import find_method, known_methods
from nexus_adapters.registry import import_modules
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.parsing import field_types, validated

FORMAT, FORMAT_VERSION = "format_version", 2
"""Of the recipe that a run keeps; the first had none, and one flat `[adapter]` section for all methods."""

# What options of methods were where nobody set them, in a run's recipe of the first version.
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
# What no method of today has together, and every recipe has that a run of the first version has kept.
_FIRST_ALONE = {"reads_prompt", "size_ratio"}


def load_recipe(path: str | Path, settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a TOML file, with settings such as "training.learning_rate=2e-5" on top.

    Its `imports` are imported. The recipe that a run has kept is one too, also of an earlier version.

    Raises:
        InvalidArgument: for a missing file, what is no TOML, a setting without "=", an unknown key (with the
            nearest right name), a wrong type, a value out of range, or values that do not agree.
    """
    content = read_toml(Path(path), "RECIPE")
    section = content.get("adapter")
    is_first = isinstance(section, dict) and section.keys() >= _FIRST_ALONE
    content = _as_of_now(content, "RECIPE", path, 1 if is_first else FORMAT_VERSION)
    for setting in settings:
        _apply(content, setting)
    return parse_config(content)


def read_toml(file: Path, argument: str) -> dict[str, Any]:
    """The content of a TOML file. `InvalidArgument` for `argument` if it is missing or not valid TOML."""
    expect(file.is_file(), argument, "a TOML file", f"'{file}', which does not exist")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(argument, "valid TOML", f"'{file}' ({error})") from error


def parse_config(content: Mapping[str, Any]) -> TrainConfig:
    """The config of nested mappings as TOML gives them; `InvalidArgument` as `load_recipe`."""
    if isinstance(content.get("imports"), list | tuple):
        import_modules(map(str, content["imports"]), "imports")
    return validated(TrainConfig, content)


def load_run_recipe(path: Path) -> TrainConfig:
    """The config that a run has kept in its folder, also one of an earlier version.

    Nothing is imported for it: an unknown method is an `InvalidArgument` that says what to import.
    """
    return validated(TrainConfig, _as_of_now(read_toml(path, "output_dir"), "output_dir", path, 1))


def _as_of_now(content: dict[str, Any], argument: str, path: str | Path, version: int) -> dict[str, Any]:
    """A recipe in the form of today. `version`: of one that does not say which it has."""
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
    """An `[adapter]` section from before methods had their own options, without those that had no effect."""
    whole = {**_FIRST_DEFAULTS, **section}
    known = {f.name for f in dataclasses.fields(find_method(whole["method"], "adapter.method").Options)}
    return {key: value for key, value in whole.items() if key in known}


def dump_config(config: TrainConfig) -> str:
    """The whole config as TOML that `load_run_recipe` reads back to an equal one."""
    content = {FORMAT: FORMAT_VERSION, **_without_none(dataclasses.asdict(config))}
    return tomli_w.dumps(_with_lists(content))


def _without_none(content: Any) -> Any:
    """TOML has no null: what follows from other options is left out."""
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    is_pair = bool(equals) and all(part.strip() for part in key.split("."))
    expect(is_pair, "--set", "KEY=VALUE, as in training.batch_size=4", repr(setting))
    *sections, name = (part.strip() for part in key.split("."))
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InvalidArgument("--set", f"the name of a section before '.{name}'", repr(section))
    value = _value(text)
    is_text = not isinstance(value, str) and str in _types(sections, name)  # a folder may be called 2024
    table[name] = text if is_text else value


def _types(sections: Sequence[str], name: str) -> set[Any]:
    """Of a field; in `[adapter]` of each method that has it."""
    if list(sections) == ["adapter"]:
        return {field_types(method.Options).get(name) for method in known_methods()}
    return {field_types(TrainConfig, sections).get(name)}


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
