"""Mixed precision where the processor gains by it."""

from __future__ import annotations

import torch

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
