"""A T2I-Adapter's weights as the trunk of a Nexus adapter: what both have, and what each must make up."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nexus_adapters.errors import InvalidArgument

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
