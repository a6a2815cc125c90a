"""The methods by name, finding the method of an adapter, and `load_adapter`, which loads any adapter."""

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
    """Register a method under its name, for use in recipes and commands."""
    METHODS.add(method.name, method)
    return method


def find_method(name: str, argument: str = "method") -> Method:
    """Return the method of this name. `InvalidArgument`, named `argument`, lists the known ones."""
    return METHODS.find(name, argument)


def known_methods() -> list[Method]:
    """Return the registered methods and those of importable installed packages, newest first.

    So a user's method for a subclass takes precedence over the package's method for its parent class.
    """
    found = []
    for name in METHODS:
        with suppress(InvalidArgument):
            found.append(METHODS[name])
    return found[::-1]


def method_of(module: nn.Module | Any) -> Method:
    """Return the method of a loaded adapter. `InvalidArgument` named "adapter" if there is none."""
    found = next((method for method in known_methods() if method.owns(module)), None)
    if found is None:
        labels = ", ".join(dict.fromkeys(method.label for method in known_methods()))
        raise InvalidArgument("adapter", f"one of {labels}", f"a {type(module).__name__}")
    return found


def method_for(saved: Saved) -> Method:
    """Return the method that loads a saved adapter. `InvalidArgument` named "adapter" if there is none."""
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
    """Load a saved adapter on the CPU, in eval mode.

    Args:
        source: the name of an adapter included with the base ("prime", "slim", "prime-paper", "slim-paper",
            "t2i"), a folder, a Hub id, a single .safetensors file, a training run's folder or one of its
            checkpoints (the averaged weights, if there are any), a saved Nexus pipeline (its adapter), a
            T2I-Adapter as first published, or a ControlNet. "./prime" is a folder.
        condition: the structure maps that the adapter reads; only used with a name.
        base: the base whose adapter names are known; None for "embedded".
        dtype: of the weights.

    Returns:
        A `NexusAdapter`, or a diffusers model: `T2IAdapter`, `ControlNetModel`, `ControlNetXSAdapter`.

    Raises:
        InvalidArgument: named "adapter" or "condition", if there is no such adapter, or its tensors are
            missing, unexpected, misshapen, not finite, or changed after saving.
    """
    return load_saved(find_saved(source, condition, base or EMBEDDED), dtype)


def load_saved(saved: Saved, dtype: torch.dtype = torch.float32) -> Any:
    """Load an adapter that `find_saved` found; see `load_adapter`."""
    return load_with(method_for(saved), saved, dtype)
