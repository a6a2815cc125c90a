"""The tensors in an adapter's files, whoever saved them. Of pickles only tensors are read: no code is run."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.stored import check_hash
from nexus_adapters.adapter.trunk import name_as_diffusers
from nexus_adapters.bases.signs import seems_to_be
from nexus_adapters.errors import InvalidArgument, expect, one_line

_PICKLE = b"\x80"  # the first byte of pickles since protocol 2


def read_tensors(saved: Saved) -> dict[str, Tensor]:
    """All tensors of an adapter's files, in the names of diffusers.

    `InvalidArgument` named "source": what is no Nexus or T2I-Adapter is described by what it seems to be.
    """
    tensors = stored_tensors(saved)
    if any(name.startswith("adapter.conv_in.") for name in tensors):
        return tensors
    starts = {name.split(".")[0] for name in tensors}
    if {"conv_in", "body"} <= starts:
        return name_as_diffusers(tensors)
    raise InvalidArgument("source", "an adapter", f"'{saved.path}', which seems to be {seems_to_be(tensors)}")


def stored_tensors(saved: Saved) -> dict[str, Tensor]:
    """All tensors of an adapter's files in the names that they have there.

    `InvalidArgument` named "source" where they are not those that were saved, and for what has none.
    """
    tensors: dict[str, Tensor] = {}
    if all(file.suffix == ".safetensors" for file in saved.files):
        check_hash(saved.files, "source")
    for file in saved.files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    return tensors


def tensor_names(saved: Saved) -> frozenset[str]:
    """The names in an adapter's files as they are: of safetensors from the header, of a pickle by reading it.

    Empty for a pickle that cannot be read: `read_tensors` says why.
    """
    if all(file.suffix == ".safetensors" for file in saved.files):
        return frozenset(saved.tensors)
    try:
        return frozenset(name for file in saved.files for name in _unpickled(file))
    except InvalidArgument:
        return frozenset()


def _unpickled(file: Path) -> dict[str, Tensor]:
    expect(_may_be_pickled(file), "source", "tensors", f"'{file}', which has none")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidArgument(
            "source", "pickled tensors and nothing else", f"'{file}', a pickle with code", "It was not run"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = one_line(error)
        raise InvalidArgument("source", "tensors", f"'{file}', which cannot be read ({reason})") from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidArgument("source", "tensors by name", f"'{file}', a {type(content).__name__}")
    return dict(content)


def _may_be_pickled(file: Path) -> bool:
    """Whether it begins as what `torch.save` writes does, now or in its first years."""
    with file.open("rb") as stream:
        return stream.read(1) == _PICKLE or zipfile.is_zipfile(file)
