"""The cost of a control: its parameters, and its arithmetic operations, counted by torch without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nexus_adapters.bases.base import Base


@dataclass(frozen=True)
class Cost:
    """What a control adds to one image, without guidance.

    Attributes:
        parameters: number of parameters.
        gmacs_once: billions of multiply-accumulates (GMACs) once per image.
        gmacs_per_step: GMACs in every step.
    """

    parameters: int
    gmacs_once: float = 0.0
    gmacs_per_step: float = 0.0

    def gmacs(self, steps: int) -> float:
        """Return the GMACs for an image with this many steps."""
        return self.gmacs_once + steps * self.gmacs_per_step


@dataclass(frozen=True)
class Example:
    """Tensors with the shapes of a call, on the meta device."""

    condition: Tensor
    text: Tensor
    latents: Tensor
    timestep: Tensor
    added: Mapping[str, Any] = field(default_factory=dict)


def example(base: Base, size: int, dtype: torch.dtype = torch.float32) -> Example:
    """Return the tensors of a call for one square image with sides of `size` pixels, on the meta device."""
    side = size // base.pixels_per_latent
    with torch.device("meta"):
        return Example(
            condition=torch.empty(1, 3, size, size),
            text=torch.empty(1, base.prompt_tokens, base.text_width),
            latents=torch.empty(1, base.latent_channels, side, side),
            timestep=torch.zeros(1),
            added=base.added_arguments(base.example_added(1, dtype)),
        )


def skeleton(module: nn.Module | Any) -> Any:
    """Return an adapter with the same config on the meta device."""
    kind: Any = type(module)
    with torch.device("meta"):
        return kind.from_config(module.config)


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def counted_gmacs(run: Callable[[], object]) -> float:
    """Return the GMACs that torch counts while `run` runs."""
    # torch counts attention on all devices only in the plain implementation.
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops()) / 2e9
