"""Mixed precision on hardware that benefits from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.training.config import MixedPrecision

_BF16_UNITS = ("amx_bf16", "avx512_bf16")  # without these a CPU emulates bfloat16, which is many times slower


def multiplies_bf16(device: str) -> bool:
    """Return whether `device` ("cpu", "cuda:0", ...) multiplies bfloat16 in hardware."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in _BF16_UNITS)


def autocast(device: str) -> torch.autocast:
    """Return an autocast to bfloat16 if `device` supports it in hardware, else one that is disabled."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=multiplies_bf16(device))


@dataclass(frozen=True)
class Precision:
    """The precision of a run. `dtype` is that of the frozen base; adapter weights are always float32."""

    device_type: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return the autocast for the adapter's forward pass."""
        is_mixed = self.dtype != torch.float32
        return torch.autocast(self.device_type, self.dtype if is_mixed else None, enabled=is_mixed)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss must be scaled so that small gradients do not vanish, as with float16."""
        return self.dtype == torch.float16


def choose_precision(name: MixedPrecision, device: torch.device) -> Precision:
    """Return the precision that `training.mixed_precision` means on a device.

    "auto" is bfloat16 if the device multiplies it in hardware, else float16 on CUDA, else float32.

    Raises:
        InvalidArgument: for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise InvalidArgument("training.mixed_precision", "auto, no or bf16 on a CPU", "'fp16'")
    if name == "auto":
        name = "bf16" if multiplies_bf16(str(device)) else "fp16" if device.type == "cuda" else "no"
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Precision(device.type, dtypes[name])
