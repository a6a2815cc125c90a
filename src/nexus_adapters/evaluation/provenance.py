"""What a result was made with: versions, and the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from nexus_adapters import __version__


def versions() -> dict[str, str]:
    """Versions of what decides an image's pixels."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {"nexus-adapters": __version__, **libraries}


def machine() -> dict[str, object]:
    """The processor and its cores, the accelerator where there is one, the system, and Python."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def peak_memory_gib() -> float | None:
    """The most memory that this process has held so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if platform.system() == "Darwin" else 2**20), 2)  # bytes there, KiB elsewhere


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux, where `platform` does not know the model
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
