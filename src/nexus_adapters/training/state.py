"""All that a run carries from step to step, as tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nexus_adapters.training.checkpoint import Checkpoint

MODULE, AVERAGE, OPTIMIZER = "module", "average", "optimizer"  # file names in a checkpoint


@dataclass
class TrainState:
    """What is trained, its optimizer, and where asked for the weights' average and fp16's loss scale."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    bad_steps: int = 0  # in a row, up to the last one

    @classmethod
    def of(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema_decay: float = 0.0,
        use_fp16: bool = False,
    ) -> TrainState:
        """A state before the first step."""
        average = _average_of(module, ema_decay) if ema_decay else None
        return cls(module, optimizer, torch.amp.GradScaler(enabled=use_fp16), average)

    @property
    def result(self) -> nn.Module:
        """The module that the run is for: the average, where there is one."""
        return self.module if self.average is None else self.average.module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensor name -> tensor."""
        optimizer = {
            f"{index}.{name}": value
            for index, state in self._optimizer_state().items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        average = {} if self.average is None else self.average.module.state_dict()
        return {MODULE: self.module.state_dict(), AVERAGE: average, OPTIMIZER: optimizer}

    def scalars(self) -> dict[str, Any]:
        """What is no tensor."""
        optimizer = {
            f"{index}.{name}": value
            for index, state in self._optimizer_state().items()
            for name, value in state.items()
            if not isinstance(value, Tensor)
        }
        averaged = 0 if self.average is None else int(self.average.n_averaged)
        return {
            "optimizer": optimizer,
            "averaged_steps": averaged,
            "loss_scale": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
        }

    def restore(self, checkpoint: Checkpoint, scalars: Mapping[str, Any]) -> None:
        """Take what `tensors` and `scalars` gave."""
        self.module.load_state_dict(checkpoint.tensors(MODULE))
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors(AVERAGE))
            self.average.n_averaged.fill_(scalars["averaged_steps"])
        self.scaler.load_state_dict(scalars["loss_scale"])
        self.bad_steps = scalars["bad_steps"]
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**checkpoint.tensors(OPTIMIZER), **scalars["optimizer"]}.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _optimizer_state(self) -> dict[int, dict[str, Any]]:
        """Of each parameter; what bitsandbytes wraps in a mapping of its own, it takes back without."""
        found: dict[int, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            inner = [value for value in state.values() if isinstance(value, Mapping)]
            found[index] = {name: value for name, value in state.items() if not isinstance(value, Mapping)}
            for part in inner:
                found[index] |= part
        return found


def _average_of(module: nn.Module, decay: float) -> AveragedModel:
    following: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch gives it no types
    return AveragedModel(module, multi_avg_fn=following)
