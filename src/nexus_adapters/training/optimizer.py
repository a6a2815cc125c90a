"""The optimizers, AdamW (also in 8 bits) and Muon, and the learning-rate schedule.

Muon orthogonalizes the momentum of each matrix before a step, so that it learns all directions equally fast
(Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024). The step size follows "Muon
is Scalable for LLM Training" (arXiv 2502.16982, section 2.2). `torch.optim.Muon` does not support
convolutions, and it computes only in bfloat16, which many CPUs emulate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import TrainingOptions

_ENDS = ("conv_in", "conv_out")  # diffusers' names of a model's first and last layer
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
_ITERATIONS = 5
_UPDATE_RMS = 0.2  # root mean square of a step per learning rate; AdamW's is about the same


def build_optimizer(options: TrainingOptions, module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer for the trainable parameters of `module`.

    Raises:
        InvalidArgument: for adamw8bit without CUDA or bitsandbytes.
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
    """Raise `InvalidArgument` if the optimizer is not available on this machine."""
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
    """Return the ids of the weights of linear layers and convolutions, except the first and last layer."""
    found = set()
    for name, part in module.named_modules():
        is_end = any(segment in _ENDS for segment in name.split("."))
        if isinstance(part, nn.Linear | nn.Conv2d) and not is_end:
            found.add(id(part.weight))
    return found


def learning_rate_at(options: TrainingOptions, step: int) -> float:
    """Return the learning rate of the optimizer step that follows `step` finished ones.

    It rises to `learning_rate` during `warmup_steps`. Then it is constant, or falls to zero at
    `max_train_steps`, linearly or along half a cosine.
    """
    peak = options.learning_rate * min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "constant":
        return peak
    rest = max(1, options.max_train_steps - options.warmup_steps)
    progress = min(1.0, max(0, step - options.warmup_steps) / rest)
    if options.schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class Muon(torch.optim.AdamW):
    """Muon for `matrices` and AdamW for `others`, with the same learning rate and weight decay.

    `matrices` are weights of linear layers and convolutions, (out, in, ...); the axes after the first are
    flattened. Embeddings and a model's first and last layer belong to `others`.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
    ) -> None:
        groups = [
            {"params": list(others), "orthogonal": False},
            {"params": list(matrices), "orthogonal": True},
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters. The gradients of the matrices are None afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        super().step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for parameters in by_shape.values():  # one batched product for all matrices with the same shape
            steps = orthogonalize(torch.stack([self._momentum_of(each).flatten(1) for each in parameters]))
            size = _UPDATE_RMS * max(steps.shape[-2:]) ** 0.5
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(step.view_as(parameter), alpha=group["lr"] * size)
                parameter.grad = None

    def _momentum_of(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov momentum: the gradient is mixed into the average and then into the result."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW expects it in every state that it loads
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["step"] += 1
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - self.momentum)
        mixed: Tensor = gradient.lerp(average, self.momentum)
        return mixed


def orthogonalize(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Return approximately U V^T for each matrix U S V^T; its singular values are between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide: Tensor = matrices.mT if is_tall else matrices
    x: Tensor = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
