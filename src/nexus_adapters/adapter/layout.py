"""The names and shapes of a Nexus adapter's tensors, derived from its config.

Files are compared with them before a model is built, because a config can contain arbitrary numbers. Nothing
here imports torch, so commands that only inspect files start fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_adapters.adapter.weights import raise_for_tensors
from nexus_adapters.errors import expect

Shape = tuple[int, ...]
_UNITS = 2  # residual units per stage
_USUAL_STAGES = 64  # a custom block may have this many stages; more only if the file has as many tensors
_STAGE = re.compile(r"adapter\.body\.(\d{1,9})\.", re.ASCII)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return tensor name -> shape for an adapter with the paper's block.

    `config` has all arguments, already checked.
    """
    inner, text_width = config["heads"] * config["head_width"], config["text_width"]
    shapes: dict[str, Shape] = {}

    def convolution(name: str, out: int, inputs: int, side: int, has_bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, inputs, side, side)
        if has_bias:
            shapes[f"{name}.bias"] = (out,)

    before, groups = config["channels"][0], config["groups"]
    convolution("adapter.conv_in", before, config["in_channels"] * config["unshuffle"] ** 2, 3)
    for level, width in enumerate(config["channels"]):
        stage = f"adapter.body.{level}"
        if before != width:
            convolution(f"{stage}.in_conv", width, before, 1)
        for unit in range(_UNITS):
            block = f"{stage}.resnets.{unit}"
            if groups == 1:
                convolution(f"{block}.block1", width, width, 3)
            else:
                convolution(f"{block}.block1.gwc", width, width // groups, 3, has_bias=False)
                convolution(f"{block}.block1.pwc", width, width, 1, has_bias=False)
            convolution(f"{block}.block2", width, width, 1)
        attention = f"{stage}.cross_attention"
        shapes |= {f"{stage}.norm1.weight": (width,), f"{stage}.norm1.bias": (width,)}
        shapes |= {
            f"{attention}.to_q.weight": (inner, width),
            f"{attention}.to_k.weight": (inner, text_width),
        }
        shapes |= {f"{attention}.to_v.weight": (inner, text_width)}
        shapes |= {f"{attention}.to_out.0.weight": (width, inner), f"{attention}.to_out.0.bias": (width,)}
        before = width
    return shapes


def check_layout(
    config: Mapping[str, Any], found: Mapping[str, Shape], path: str | Path, argument: str
) -> None:
    """Raise `InvalidArgument` unless the config needs exactly the tensors found, in these shapes.

    For a custom block, only the stem is checked, and that there are no more stages than in the config: its
    stages may have no tensors.

    Args:
        config: all arguments, already checked.
        found: tensor name -> shape, as in the file.
        path: of the file, for the error.
        argument: the error's name.
    """
    channels = config["channels"]
    stages = 1 + max((int(match[1]) for name in found if (match := _STAGE.match(name))), default=-1)
    is_papers = config["block"] == "paper"
    most = len(found) if is_papers else max(len(found), _USUAL_STAGES)
    expect(
        len(channels) <= most and (is_papers or stages <= len(channels)),
        argument,
        f"the tensors of {len(channels)} stages, as in the config",
        f"those of {stages} stages in '{path}'",
    )
    if is_papers:
        needed = tensor_shapes(config)
    else:
        stem = "adapter.conv_in.weight"
        needed = {**found, stem: (channels[0], config["in_channels"] * config["unshuffle"] ** 2, 3, 3)}
    misshapen = {
        f"{name} {found[name]}, expected {shape}"
        for name, shape in needed.items()
        if name in found and found[name] != shape
    }
    raise_for_tensors(set(needed) - set(found), set(found) - set(needed), misshapen, path, argument)
