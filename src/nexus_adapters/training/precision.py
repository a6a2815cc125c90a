"""Mixed precision where the processor gains by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import MixedPrecision

_BF16_UNITS = ("amx_bf16", "avx512_bf16")  # without these a CPU emulates bfloat16, many times slower


def multiplies_bf16(device: str) -> bool:
    """Whether `device` ("cpu", "cuda:0", ...) has units that multiply bfloat16."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in _BF16_UNITS)


def autocast(device: str) -> torch.autocast:
    """Mixed precision in bfloat16 where `device` has units for it, else float32 as it is."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=multiplies_bf16(device))


@dataclass(frozen=True)
class Precision:
    """What a run computes in. `dtype` is the frozen base's; adapter weights are always float32."""

    device_type: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """For the adapter's forward pass."""
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device_type, self.dtype if is_mixed else None, enabled=is_mixed)

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would vanish without a loss scale: float16's do."""
        return self.dtype == torch.float16


def choose_precision(name: MixedPrecision, device: torch.device) -> Precision:
    """The precision of `training.mixed_precision` on a device.

    "auto" is bfloat16 where the device multiplies it, else float16 on CUDA, else float32. Raises
    `InvalidArgument` for fp16 on a CPU, which has no loss scale worth the name.
    """
    if name == "fp16" and device.type == "cpu":
        raise InvalidArgument("training.mixed_precision", "auto, no or bf16 on a CPU", "'fp16'")
    if name == "auto":
        name = "bf16" if multiplies_bf16(str(device)) else "fp16" if device.type == "cuda" else "no"
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Precision(device.type, dtypes[name])
