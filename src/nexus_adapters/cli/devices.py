"""Where to compute, and in which precision."""

from typing import TYPE_CHECKING

from nexus_adapters.errors import expect

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def choose_device(device: str) -> str:
    """`device`, or for "auto" the first available of cuda, mps and cpu. `InvalidArgument` names --device."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, is_there in available.items() if is_there]
    if device == "auto":
        return present[0]
    expect(device in present, "--device", f"an available device ({', '.join(present)})", device)
    return device


def choose_dtype(dtype: str, device: str) -> "torch.dtype":
    """`dtype` by name; for "auto" float16 on cuda, and float32 elsewhere."""
    import torch

    name = ("float16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    chosen: torch.dtype = getattr(torch, name)
    return chosen
