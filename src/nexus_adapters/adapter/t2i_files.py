"""Saved T2I-Adapters (arXiv 2302.08453): their shapes, and diffusers' model with their tensors.

The model is built from the tensors' shapes. Its config is only compared with them, because it can contain
arbitrary numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.adapter import T2IAdapter  # noqa: TID251  # built here, not asked for
from torch import Tensor

from nexus_adapters.adapter.arguments import check_channels, shown
from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.tensors import load_adapter_tensors
from nexus_adapters.adapter.weights import check_tensors
from nexus_adapters.errors import expect, renamed

# Side of the stem's pixel squares -> the `adapter_type` that usually has such a stem.
_STEMS = {8: "full_adapter", 16: "full_adapter_xl"}
TEXT_WIDTHS = {"full_adapter": 768, "full_adapter_xl": 2048}
_IN_STAGE = re.compile(r"adapter\.body\.(\d{1,3})\.", re.ASCII)
_IN_UNIT = re.compile(r"adapter\.body\.0\.resnets\.(\d{1,3})\.", re.ASCII)


def load_t2i(saved: Saved) -> Any:
    """Load diffusers' `T2IAdapter` from files of any known format, in the precision of its tensors.

    Raises:
        InvalidArgument: named "source", if the files are not a T2I-Adapter.
    """
    return build_t2i(saved, load_adapter_tensors(saved))


def build_t2i(saved: Saved, tensors: Mapping[str, Tensor]) -> Any:
    """Build diffusers' `T2IAdapter` from tensors with diffusers' names. For errors, see `load_t2i`."""
    arguments = _light_arguments(tensors, saved) if is_light(tensors) else _full_arguments(tensors, saved)
    for name, found in arguments.items():
        stated = saved.config.get(name, found)
        expect(stated == found, "source", f"{name} {found} in the config, as in the tensors", shown(stated))
    with torch.device("meta"):
        t2i: Any = T2IAdapter(**arguments)
    check_tensors(t2i, tensors, saved.path, "source")
    t2i.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return t2i.eval()


def is_light(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors are a light T2I-Adapter's: only its blocks end in a convolution."""
    return "adapter.body.0.out_conv.weight" in tensors


def _full_arguments(tensors: Mapping[str, Tensor], saved: Saved) -> dict[str, Any]:
    geometry = trunk_geometry(tensors, saved)
    return {
        "in_channels": geometry["in_channels"],
        "channels": geometry["channels"],
        "num_res_blocks": _units(tensors),
        "downscale_factor": geometry["unshuffle"],
        "adapter_type": saved.config.get("adapter_type", _STEMS.get(geometry["unshuffle"], "full_adapter")),
    }


def _light_arguments(tensors: Mapping[str, Tensor], saved: Saved) -> dict[str, Any]:
    """Return the arguments of a light adapter. It has one block more than `channels` has entries."""
    blocks = _count_stages(tensors)
    widths = [shape_of(f"adapter.body.{i}.out_conv.weight", 4, tensors, saved)[0] for i in range(blocks)]
    inputs = shape_of("adapter.body.0.in_conv.weight", 4, tensors, saved)[1]
    side = saved.config.get("downscale_factor", 8)
    fits = type(side) is int and side > 0 and inputs > 0 and inputs % side**2 == 0
    expect(fits, "source", "a downscale_factor that fits its stem", f"{shown(side)} with {inputs} inputs")
    expect(blocks > 1 and min(widths) >= 4, "source", "a light T2I-Adapter's blocks", f"widths {widths}")
    return {
        "in_channels": inputs // side**2,
        "channels": widths[:-1],
        "num_res_blocks": _units(tensors),
        "downscale_factor": side,
        "adapter_type": "light_adapter",
    }


def _count_stages(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := _IN_STAGE.match(name))), default=-1)


def _units(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of residual units in the first stage."""
    return 1 + max((int(found[1]) for name in tensors if (found := _IN_UNIT.match(name))), default=-1)


def trunk_geometry(tensors: Mapping[str, Tensor], saved: Saved) -> dict[str, Any]:
    """Return `in_channels`, `channels`, `pools` and `unshuffle`, by the tensors and the config."""
    channels = [
        shape_of(f"adapter.body.{i}.resnets.0.block2.weight", 4, tensors, saved)[0]
        for i in range(_count_stages(tensors))
    ]
    inputs = shape_of("adapter.conv_in.weight", 4, tensors, saved)[1]
    stated = saved.config.get("downscale_factor")
    sides = [stated] if type(stated) is int else [s for s in _STEMS if inputs in (s**2, 3 * s**2)]
    expect(
        len(sides) == 1 and sides[0] >= 1 and inputs > 0 and inputs % sides[0] ** 2 == 0,
        "source",
        "a stem for 8x8 or 16x16 pixels of 1 or 3 channels, or a config with a downscale_factor that fits",
        f"a stem with {inputs} inputs in '{saved.path}'",
    )
    kind = saved.config.get("adapter_type", _STEMS.get(sides[0], "full_adapter"))
    expect(kind in list(TEXT_WIDTHS), "source", f"adapter_type {' or '.join(TEXT_WIDTHS)}", shown(kind))
    with renamed({"channels": "source"}):
        check_channels(channels)
    pools = [int(i > 0 if kind == "full_adapter" else i == 2) for i in range(len(channels))]
    return {
        "in_channels": inputs // sides[0] ** 2,
        "channels": channels,
        "pools": pools,
        "unshuffle": sides[0],
    }


def shape_of(name: str, dims: int, tensors: Mapping[str, Tensor], saved: Saved) -> tuple[int, ...]:
    """Return the shape of a required tensor with `dims` dimensions, else raise `InvalidArgument`."""
    expect(name in tensors, "source", f"weights with {name}", f"'{saved.path}', which lacks it")
    shape = tuple(tensors[name].shape)
    expect(len(shape) == dims, "source", f"{name} with {dims} dimensions", f"{shape} in '{saved.path}'")
    return shape
