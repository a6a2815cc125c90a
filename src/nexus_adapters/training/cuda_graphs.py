"""CUDA graphs of the frozen denoiser, recorded once per batch shape and replayed in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def supports_cuda_graphs(device: torch.device) -> bool:
    """Return whether CUDA graphs can be recorded on a device."""
    return device.type == "cuda"


class GraphedDenoiser(nn.Module):
    """A frozen denoiser whose forward and backward passes are a single launch each.

    With a small model or a small batch, the GPU waits for the CPU, which launches thousands of operations per
    step. The prediction is the same. Without gradients, the denoiser is called directly.

    Args:
        denoiser: a denoiser in eval mode without trainable weights. It is called with tensors, also in lists
            and dicts, and with `return_dict=False`.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._recorded: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def forward(self, *inputs: Any, **options: Any) -> tuple[Tensor]:
        """Return the denoiser's prediction; the next call overwrites it.

        `inputs` and `options` are the denoiser's arguments, such as latents (b, c, h, w), timesteps (b,) and
        prompt embeddings (b, n, d).
        """
        if not torch.is_grad_enabled():
            predicted: tuple[Tensor] = self.denoiser(*inputs, **options)
            return predicted
        leaves, layout = tree_flatten((inputs, options))
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        shapes = tuple((each.shape, each.dtype, each.requires_grad) for each in tensors)
        key = (str(layout), is_tensor, others, shapes)
        if key not in self._recorded:
            self._recorded[key] = self._record(tensors, is_tensor, others, layout)
        return (self._recorded[key](*tensors),)

    def _record(
        self, tensors: list[Tensor], is_tensor: tuple[bool, ...], others: tuple[Any, ...], layout: Any
    ) -> Any:
        def call(*given: Tensor) -> Tensor:
            remaining = iter(given)
            leaves = [
                next(remaining) if here else other for here, other in zip(is_tensor, others, strict=True)
            ]
            inputs, options = tree_unflatten(leaves, layout)
            predicted: Tensor = self.denoiser(*inputs, **options)[0]
            return predicted

        samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in tensors)
        record: Any = torch.cuda.make_graphed_callables
        return record(call, samples, allow_unused_input=True)
