"""`load_adapter`: the one way to load an adapter, whatever its kind and wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_adapters.adapter.saved import Saved, find_saved, within
from nexus_adapters.bases.source import EMBEDDED, no_loading_bars
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.methods.registry import method_for

# What loaders call the argument that names the adapter's files.
_NAMES_OF_SOURCE = ("adapter", "source", "path", "pretrained_model_name_or_path")


def load_adapter(
    source: str | Path,
    condition: str = "canny",
    base: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A saved adapter, on the CPU, in eval mode.

    Args:
        source: the name of an adapter that ships with the base ("prime", "slim", "prime-paper", "slim-paper",
            "t2i"), a folder, a Hub id, a single .safetensors file, a training run's folder or one of its
            checkpoints (the average of the weights, where there is one), a saved Nexus pipeline (its
            adapter), a T2I-Adapter as first published, or a ControlNet. "./prime" is a folder.
        condition: the structure maps that it reads; only names need it.
        base: the base within which names are looked up; None is "embedded".
        dtype: of the weights.

    Returns:
        A `NexusAdapter`, or a class of diffusers: `T2IAdapter`, `ControlNetModel`, `ControlNetXSAdapter`.

    Raises:
        InvalidArgument: named "adapter" or "condition", for what is none of these, and where tensors are
            missing, surplus, misshapen, not finite, or not those that were saved.
        FileNotFoundError: for an adapter of the package that this installation lacks.
    """
    return load_saved(find_saved(source, condition, base or EMBEDDED), dtype)


def load_saved(saved: Saved, dtype: torch.dtype = torch.float32) -> Any:
    """As `load_adapter`, of one that has been found."""
    method = method_for(saved)
    try:
        with no_loading_bars():
            loaded = method.load(saved)
    except InvalidArgument as error:
        if error.name in _NAMES_OF_SOURCE:
            raise error.with_name("adapter") from error
        raise within("adapter", f"a saved {method.label}", saved.source, error) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # each with a page of hints
        reason = one_line(error)
        raise InvalidArgument(
            "adapter", f"a saved {method.label}", f"'{saved.source}' ({type(error).__name__}: {reason})"
        ) from error
    # diffusers' own `to` warns of parts to keep in float32: here none.
    return nn.Module.to(loaded, dtype).eval()
