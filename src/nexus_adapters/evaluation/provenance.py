"""The provenance of a result: versions, the machine, and models with their hashes and precision."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nexus_adapters import __version__
from nexus_adapters.bases.base import parts_sha256, public_config, without_origin
from nexus_adapters.files import folder_sha256


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype with this name; "auto" is float16 on CUDA, else float32."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def model_sha256(parts: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of all that determines what models compute: weights, vocabularies and configs.

    Args:
        parts: modules, tokenizers and schedulers.
        config: the config of what contains them, such as a pipeline.
    """
    configs = {"": without_origin(config or {})}
    for name, part in parts.items():
        configs[name] = public_config(part) | {"class": type(part).__name__}
    text = json.dumps([parts_sha256(parts), configs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def source_sha256(name: str) -> str:
    """Return the SHA-256 of a model's folder or file; for a Hub id, that of the name."""
    path = Path(name)
    return folder_sha256(path) if path.exists() else hashlib.sha256(name.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of everything that determines an image's pixels."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {"nexus-adapters": __version__, **libraries}


def machine() -> dict[str, object]:
    """Return the processor and its cores, the accelerator if any, the system, and Python's version."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def peak_memory_gib() -> float | None:
    """Return the peak memory of this process in GiB; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if platform.system() == "Darwin" else 2**20), 2)  # bytes on macOS, else KiB


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # on Linux `platform` does not know the model
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"
