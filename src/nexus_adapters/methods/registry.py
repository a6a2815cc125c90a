"""The methods by name, and which of them an adapter belongs to; `load_adapter`, which loads any."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_adapters.adapter.saved import Saved, find_saved
from nexus_adapters.adapter.tensors import tensor_names
from nexus_adapters.bases.parts import seems_to_be
from nexus_adapters.bundled import EMBEDDED
from nexus_adapters.choices import CONDITION
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.methods.method import Method, load_with
from nexus_adapters.registry import IMPORT_HINT, Registry

METHODS: Registry[Method] = Registry("method", "nexus_adapters.methods")


def register_method(method: Method) -> Method:
    """Add a method under its name, which recipes and commands then know."""
    METHODS.add(method.name, method)
    return method


def find_method(name: str, argument: str = "method") -> Method:
    """The method of this name. `InvalidArgument`, for `argument`, lists the known ones."""
    return METHODS.find(name, argument)


def known_methods() -> list[Method]:
    """The registered ones, and those of installed packages that can be imported; the newest first.

    So a user's method for a class of its own is asked before one of the package that knows its base class.
    """
    found = []
    for name in METHODS:
        with suppress(InvalidArgument):
            found.append(METHODS[name])
    return found[::-1]


def method_of(module: nn.Module | Any) -> Method:
    """The method of a loaded adapter. `InvalidArgument` named "adapter" for what is none."""
    found = next((method for method in known_methods() if method.owns(module)), None)
    if found is None:
        labels = ", ".join(dict.fromkeys(method.label for method in known_methods()))
        raise InvalidArgument("adapter", f"one of {labels}", f"a {type(module).__name__}")
    return found


def method_for(saved: Saved) -> Method:
    """The method that loads a saved adapter. `InvalidArgument` named "adapter" where none does."""
    found = next((method for method in known_methods() if method.recognizes(saved)), None)
    if found is None:
        labels = ", ".join(dict.fromkeys(method.label for method in known_methods()))
        if saved.class_name or saved.run:
            what = f"a {saved.class_name}" if saved.class_name else "something else"
        else:
            what = f"which seems to be {seems_to_be(tensor_names(saved))}"
        hint = IMPORT_HINT if saved.class_name or saved.run else ""
        raise InvalidArgument("adapter", f"a saved {labels}", f"'{saved.source}', {what}", hint)
    return found


def load_adapter(
    source: str | Path,
    condition: str = CONDITION,
    base: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A saved adapter, on the CPU, in eval mode.

    Args:
        source: the name of an adapter that ships with the base ("prime", "slim", "prime-paper", "slim-paper",
            "t2i"), a folder, a Hub id, a single .safetensors file, a training run's folder or one of its
            checkpoints (the average of the weights, where there is one), a saved Nexus pipeline (its
            adapter), a T2I-Adapter as first published, or a ControlNet. "./prime" is a folder.
        condition: the structure maps that it reads; only names need it.
        base: the base within which names are looked up; None is "embedded".
        dtype: of the weights.

    Returns:
        A `NexusAdapter`, or a class of diffusers: `T2IAdapter`, `ControlNetModel`, `ControlNetXSAdapter`.

    Raises:
        InvalidArgument: named "adapter" or "condition", for what is none of these, and where tensors are
            missing, surplus, misshapen, not finite, or not those that were saved.
    """
    return load_saved(find_saved(source, condition, base or EMBEDDED), dtype)


def load_saved(saved: Saved, dtype: torch.dtype = torch.float32) -> Any:
    """As `load_adapter`, of one that has been found."""
    return load_with(method_for(saved), saved, dtype)
