"""From options to an optimizer: AdamW, or Muon for all that it suits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nexus_adapters.training.muon import Muon

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "muon")

_ENDS = ("conv_in", "conv_out")  # as diffusers names a model's first and last layer


def build_optimizer(
    name: OptimizerName,
    module: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of `module`; a rate that suits AdamW may suit Muon as well.

    Raises ValueError for an unknown name.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    if name != "muon":
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}; received {name!r}")
    inner = inner_matrices(module)
    others = [parameter for parameter in trained if id(parameter) not in inner]
    matrices = [parameter for parameter in trained if id(parameter) in inner]
    return Muon(matrices, others, learning_rate, betas, weight_decay)


def inner_matrices(module: nn.Module) -> set[int]:
    """The ids of the weights of linear layers and convolutions, but for a model's first and last."""
    found = set()
    for name, part in module.named_modules():
        is_end = any(segment in _ENDS for segment in name.split("."))
        if isinstance(part, nn.Linear | nn.Conv2d) and not is_end:
            found.add(id(part.weight))
    return found
