"""The same numbers again on the same machine, and in what they were computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nexus_adapters.evaluation.loading import choose_dtype
from nexus_adapters.evaluation.study.plan import OWN, Cell, Study
from nexus_adapters.training.precision import choose_precision


@contextmanager
def repeatable() -> Iterator[None]:
    """While open, a GPU takes those of torch's operations that add up in a fixed order, as a CPU does anyway.

    An operation of which torch has no such form runs, and torch warns. CUBLAS_WORKSPACE_CONFIG is set, and
    stays, unless it is set before: it is read when CUDA starts.
    """
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic
    attention: Any = torch.backends.cuda
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filled = deterministic.fill_uninitialized_memory
    had_cudnn_attention = attention.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    attention.enable_cudnn_sdp(False)  # where torch only warns, its gradients add up in any order
    deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        attention.enable_cudnn_sdp(had_cudnn_attention)
        deterministic.fill_uninitialized_memory = was_filled


def precision_of(study: Study, cell: Cell) -> dict[str, str]:
    """`trained` and `drawn`: dtypes, where "auto" leaves them to the device that is here."""
    config = study.train_config(cell)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, torch.dtype] = {}
    if config is not None:
        trained_on = torch.device("cpu") if config.training.device == "cpu" else device
        found["trained"] = choose_precision(config.training.mixed_precision, trained_on).dtype
    if study.views():
        found["drawn"] = choose_dtype(study.evaluation_config(cell, OWN).dtype, device)
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}
