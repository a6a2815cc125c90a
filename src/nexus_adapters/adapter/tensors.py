"""The tensors in an adapter's files, whoever saved them, and a T2I-Adapter's as the trunk of a Nexus adapter.

Of pickles only tensors are read: no code in them runs.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.weights import check_hash
from nexus_adapters.bases.parts import seems_to_be
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import open_regular

_ORIGINAL = re.compile(r"(?:adapter\.)?body\.(\d+)\.(in_conv|block1|block2)\.(weight|bias)")
_UNITS = 2  # residual units of a stage


def name_as_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a T2I-Adapter as first published, by the names that diffusers gives them.

    There the residual units stand in one row, two a stage: `body.{2 * i + j}` is unit j of stage i.

    Raises `InvalidArgument` for any other name.
    """
    renamed = {}
    for name, tensor in tensors.items():
        found = _ORIGINAL.fullmatch(name)
        if found:
            stage, unit = divmod(int(found[1]), _UNITS)
            part = "" if found[2] == "in_conv" else f"resnets.{unit}."
            renamed[f"adapter.body.{stage}.{part}{found[2]}.{found[3]}"] = tensor
        elif name in ("conv_in.weight", "conv_in.bias"):
            renamed[f"adapter.{name}"] = tensor
        else:
            raise InvalidArgument("source", "the tensors of a T2I-Adapter", f"one named {name}")
    return renamed


def stem_for_colors(
    weight: Float[Tensor, "c u k k"], in_channels: int
) -> Float[Tensor, "c {in_channels}*u k k"]:
    """A stem for maps of one channel as one for `in_channels`; it gives the same on grey maps.

    The pixels of each channel lie in a block of their own (PixelUnshuffle).
    """
    return weight.repeat(1, in_channels, 1, 1) / in_channels


def split_kernel(
    kernel: Float[Tensor, "c c 3 3"], groups: int
) -> tuple[Float[Tensor, "c c_group 3 3"], Float[Tensor, "c c 1 1"]]:
    """The grouped 3x3 and the dense 1x1 whose sum is nearest to a plain 3x3, in least squares.

    Within the groups the sum is exact. Between them only the middle of the kernel has a place, in the 1x1;
    where both have one, the two share it equally (the solution of least norm).
    """
    channels = len(kernel)
    width = channels // groups
    grouped = torch.cat(
        [kernel[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)]
    )
    pointwise = kernel[:, :, 1:2, 1:2].clone()
    for g in range(groups):
        rows = slice(g * width, (g + 1) * width)
        pointwise[rows, rows] /= 2
    grouped = grouped.clone()
    grouped[:, :, 1, 1] /= 2
    return grouped, pointwise


def trunk_tensors(
    tensors: Mapping[str, Tensor], groups: int, grey_to: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The trunk of a Prime (`groups` 1) or Slim from a T2I-Adapter's tensors, in diffusers' names.

    `grey_to`: channels that a stem for one channel is to read; None leaves the stem as it is.

    Returns the tensors, and which share of the 3x3 kernels' squared norm has no place in them: 0 for Prime,
    whose trunk is the T2I-Adapter's. Slim's convolutions have no bias, so those of the 3x3 are left out.
    """
    trunk: dict[str, Tensor] = {}
    lost, total = 0.0, 0.0
    for name, tensor in tensors.items():
        if name == "adapter.conv_in.weight" and grey_to is not None:
            trunk[name] = stem_for_colors(tensor, grey_to)
        elif groups > 1 and name.endswith("block1.weight"):
            grouped, pointwise = split_kernel(tensor, groups)
            trunk[name.replace("block1.weight", "block1.gwc.weight")] = grouped
            trunk[name.replace("block1.weight", "block1.pwc.weight")] = pointwise
            total += float(tensor.square().sum())
            lost += lost_norm(tensor, groups)
        elif groups > 1 and name.endswith("block1.bias"):
            continue
        else:
            trunk[name] = tensor
    return trunk, lost / total if total else 0.0


def lost_norm(kernel: Float[Tensor, "c c 3 3"], groups: int) -> float:
    """The squared norm of what `split_kernel` leaves out: between the groups, all but the middle."""
    width = len(kernel) // groups
    left_out = kernel.square()
    left_out[:, :, 1, 1] = 0
    for g in range(groups):
        left_out[g * width : (g + 1) * width, g * width : (g + 1) * width] = 0
    return float(left_out.sum())


_PICKLE = b"\x80"  # the first byte of pickles since protocol 2


def load_adapter_tensors(saved: Saved) -> dict[str, Tensor]:
    """All tensors of an adapter's files, in the names of diffusers.

    `InvalidArgument` named "source": what is no Nexus or T2I-Adapter is described by what it seems to be.
    """
    tensors = load_tensors(saved)
    if any(name.startswith("adapter.conv_in.") for name in tensors):
        return tensors
    starts = {name.split(".")[0] for name in tensors}
    if {"conv_in", "body"} <= starts:
        return name_as_diffusers(tensors)
    raise InvalidArgument("source", "an adapter", f"'{saved.path}', which seems to be {seems_to_be(tensors)}")


def load_tensors(saved: Saved) -> dict[str, Tensor]:
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

    Empty for a pickle that cannot be read: `load_adapter_tensors` says why.
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
    with open_regular(file) as stream:
        return stream.read(1) == _PICKLE or zipfile.is_zipfile(file)
