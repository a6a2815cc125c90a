"""Packages that only some features need, and how to install those that are missing.

The hints name the packages, not an extra of nexus-adapters: for an extra, pip would look for nexus-adapters
itself on PyPI, also in a clone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.util import find_spec

from nexus_adapters.errors import InvalidArgument

_DATA = {"datasets": "datasets", "filelock": "filelock", "fsspec": "fsspec", "imagehash": "imagehash"}
_TRAIN = {"matplotlib": "matplotlib", "psutil": "psutil", "pydantic": "pydantic", "tomli_w": "tomli-w"}
# Extra of pyproject.toml -> module -> what pip installs it from.
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "data": _DATA,
    "train": {**_DATA, **_TRAIN},
    "eval": {**_DATA, **_TRAIN, "scipy": "scipy", "torchmetrics": "torchmetrics"},
    "lora": {"peft": "peft"},
    "ray": {**_DATA, "ray": "ray[data]"},
    "heic": {"pillow_heif": "pillow-heif"},
    "app": {"gradio": "gradio"},
}


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be found; it is not imported."""
    return find_spec(module) is not None


def check_packages(extra: str, *modules: str) -> None:
    """Raise `InvalidArgument` for the first of these modules of an extra that is not installed."""
    for module in modules:
        if not is_installed(module):
            raise missing_package(extra, module)


def missing_package(extra: str, module: str | None) -> InvalidArgument:
    """Return the error for a module of an extra that is not installed; `ImportError.name` may be None."""
    top = (module or extra).partition(".")[0]
    return InvalidArgument(f"the package {top}", hint=f"Run {install_command(extra, top)}")


def install_command(extra: str, module: str = "") -> str:
    """Return the command that installs a module and everything else that its extra lacks."""
    known = EXTRAS[extra]
    needed = [source for each, source in known.items() if each == module or not is_installed(each)]
    if module and module not in known:
        needed.append(module)
    return shlex.join(["pip", "install", *(needed or known.values())])
