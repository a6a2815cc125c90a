"""Whether what was loaded is what the config needs: no tensor missing, surplus, misshapen or not finite."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nexus_adapters.errors import InvalidArgument


def check_loaded(
    adapter: nn.Module, info: Mapping[str, Any], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless diffusers' loading info says that every tensor was loaded, and no other.

    `argument` is the one that named the path.
    """
    # Whatever diffusers may have overlooked: the parameter then stays on `meta`.
    left_empty = {name for name, tensor in adapter.named_parameters() if tensor.is_meta}
    left_empty -= _offloaded(adapter)
    misshapen = {
        f"{name} {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in info.get("mismatched_keys", ())
    }
    left_empty -= {name for name, _, _ in info.get("mismatched_keys", ())}
    missing = left_empty | set(info.get("missing_keys", ()))
    _raise_for(missing, set(info.get("unexpected_keys", ())), misshapen, path, argument)
    _check_finite(dict(adapter.named_parameters()), path, argument)


def check_tensors(
    adapter: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless these are exactly the adapter's tensors, all of them finite."""
    needed = adapter.state_dict()
    misshapen = {
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(needed[name].shape)}"
        for name in set(needed) & set(tensors)
        if tensors[name].shape != needed[name].shape
    }
    _raise_for(set(needed) - set(tensors), set(tensors) - set(needed), misshapen, path, argument)
    _check_finite(tensors, path, argument)


def _raise_for(
    missing: set[str],
    surplus: set[str],
    misshapen: set[str],
    path: str | os.PathLike[str],
    argument: str,
) -> None:
    problems = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    found = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names)
    if found:
        raise InvalidArgument(
            argument, "weights with exactly the tensors that the config needs", f"'{path}' ({found})"
        )


def _check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], argument: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            found = f"'{path}', where some of {name} are not finite"
            raise InvalidArgument(argument, "weights that are finite numbers", found)


def _offloaded(adapter: nn.Module) -> set[str]:
    """The parameters that a device map has put aside, and that accelerate's hooks fetch for each call."""
    names = set()
    for module_name, module in adapter.named_modules():
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or ()
        for name, _ in module.named_parameters(recurse=False):
            if name in stored:
                names.add(f"{module_name}.{name}")
    return names
