"""A recipe's `[adapter]` section: the options of the method it names or of the adapter it starts from."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nexus_adapters.adapter.saved import RUN_CONFIG, find_saved
from nexus_adapters.errors import InvalidArgument, expect, one_line, renamed
from nexus_adapters.methods import AdapterOptions, find_method, known_methods, method_for
from nexus_adapters.training.parsing import SECTION, validated


def adapter_options(
    section: Mapping[str, Any], condition: str, base: str, output_dir: str = ""
) -> AdapterOptions:
    """Return a recipe's `[adapter]` section as the options of its method.

    Without a `method`, the section gets the method of the adapter in `start_from`.

    Args:
        section: the keys and values of `[adapter]`.
        condition: the condition whose adapters the names are looked up among.
        base: the base whose adapters the names are looked up among.
        output_dir: the run's folder. It records the method of an earlier start, in case the adapter in
            `start_from` no longer exists.

    Raises:
        InvalidArgument: for an unknown method or key, a key that has no effect with this method, or a
            `start_from` that cannot be read.
    """
    start = section.get("start_from")
    if "method" not in section and isinstance(start, str) and start:
        try:
            found_method = _method_of_saved(start, condition, base)
        except InvalidArgument:
            found_method = _method_of_run(Path(output_dir), start)
            if not found_method:
                raise
        section = {**section, "method": found_method}
    name = section.get("method", AdapterOptions.method)
    expect(isinstance(name, str), "adapter.method", "a string", repr(name))
    method = find_method(name, "adapter.method")
    known = [f.name for f in dataclasses.fields(method.Options)]
    for key in section:
        if key in known:
            continue
        methods = reversed(known_methods())  # in the order of registration
        others = [m.name for m in methods if key in {f.name for f in dataclasses.fields(m.Options)}]
        if others:
            raise InvalidArgument(
                f"adapter.{key}",
                f"no such key because it has no effect with method {method.name!r}",
                repr(section[key]),
                f"It is an option of {', '.join(others)}",
            )
    kind: Any = method.Options
    found = validated(_validating(kind), section, "adapter.")
    return kind(**{name: getattr(found, name) for name in known})  # type: ignore[no-any-return]


@lru_cache(maxsize=64)  # pydantic takes 10 ms to build one, and a study has hundreds of recipes
def _validating(options: Any) -> Any:
    """The class of a method's options with validation of the fields."""
    return dataclass(options, frozen=True, config=SECTION)


def _method_of_run(folder: Path, start: str) -> str:
    """The method of the run in `folder` if that run started from `start`, else ""."""
    try:
        adapter = tomllib.loads((folder / RUN_CONFIG).read_text(encoding="utf-8"))["adapter"]
        is_same = os.path.realpath(adapter["start_from"]) == os.path.realpath(start)
        return str(adapter["method"]) if is_same else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _method_of_saved(source: str, condition: str, base: str) -> str:
    """The name of the method that a saved adapter was trained with."""
    with renamed(lambda name: "data.condition" if name == "condition" else "adapter.start_from"):
        saved = find_saved(source, condition, base)
        try:
            return method_for(saved).configuration(saved)
        except InvalidArgument:
            raise
        except (TypeError, ValueError) as error:  # unexpected values in its config
            raise InvalidArgument("adapter", "a saved adapter", f"'{source}' ({one_line(error)})") from error
