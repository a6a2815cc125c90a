"""From options to an optimizer: AdamW, in 8 bits too, or Muon for all that it suits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import TrainingOptions
from nexus_adapters.training.muon import Muon

_ENDS = ("conv_in", "conv_out")  # as diffusers names a model's first and last layer


def build_optimizer(options: TrainingOptions, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of `module`; a rate that suits AdamW may suit Muon as well.

    Raises `InvalidArgument` for adamw8bit without CUDA or bitsandbytes.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": options.betas,
        "eps": options.epsilon,
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings)
    if options.optimizer == "adamw8bit":
        optimizer: torch.optim.Optimizer = _adamw_8bit()(trained, **settings)
        return optimizer
    inner = inner_matrices(module)
    others = [parameter for parameter in trained if id(parameter) not in inner]
    matrices = [parameter for parameter in trained if id(parameter) in inner]
    return Muon(matrices, others, **settings)


def check_optimizer(options: TrainingOptions) -> None:
    """`InvalidArgument` where the optimizer cannot be had here."""
    if options.optimizer == "adamw8bit":
        _adamw_8bit()


def _adamw_8bit() -> Any:
    expected = "adamw or muon, or adamw8bit on a CUDA device with bitsandbytes"
    if not torch.cuda.is_available():
        raise InvalidArgument("training.optimizer", expected, "'adamw8bit' without a CUDA device")
    try:
        import bitsandbytes
    except ImportError as error:
        raise InvalidArgument(
            "training.optimizer", expected, f"'adamw8bit' ({error})", "pip install bitsandbytes"
        ) from error
    return bitsandbytes.optim.AdamW8bit


def inner_matrices(module: nn.Module) -> set[int]:
    """The ids of the weights of linear layers and convolutions, but for a model's first and last."""
    found = set()
    for name, part in module.named_modules():
        is_end = any(segment in _ENDS for segment in name.split("."))
        if isinstance(part, nn.Linear | nn.Conv2d) and not is_end:
            found.add(id(part.weight))
    return found
