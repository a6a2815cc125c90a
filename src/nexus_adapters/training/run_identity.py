"""Decide which recipes belong to the same run, by the fields that determine the weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from nexus_adapters.methods import known_methods
from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.redaction import without_secrets

# Fields that may change when a run resumes: they affect only how it is monitored, stored and executed.
_FREE_SECTIONS = ("cache", "checkpoint", "log", "hub")
_FREE_FIELDS = {
    "output_dir",
    "imports",
    "data.workers",
    "data.max_bad_fraction",
    "training.cuda_graphs",
    "training.device",
    "training.max_bad_steps",
    "validation.every_steps",
    "validation.images",
    "validation.prompts",
    "validation.num_inference_steps",
    "validation.guidance_scale",
    "validation.early_stop_patience",
    "validation.select",
}
# Locations. The data are compared by content, everything else by the resolved path.
_DATA_PLACES = ("data.path", "data.shards")
HELD_OUT = "held_out"  # number of samples, recorded if earlier versions held out a different number
_PATHS = ("base.path", "base.config", "adapter.start_from")
_MOVABLE = ("base.path", "base.config")  # because a base's content is compared, too
# Only their product with the number of processes matters, which checkpoints store.
_SHARED_BATCH = {"training.batch_size", "training.gradient_accumulation_steps"}


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that determine the weights, by key; without validation, `validation.samples` is 0."""
    free = set(_FREE_FIELDS)
    if config.training.schedule == "constant":
        free.add("training.max_train_steps")
    found: dict[str, Any] = {}
    fields = dataclasses.asdict(without_secrets(config)) | {"adapter": config.adapter.identity()}
    for key, value in flat(fields).items():
        if key.split(".")[0] not in _FREE_SECTIONS and key not in free | _SHARED_BATCH:
            found[key] = list(value) if isinstance(value, tuple) else value
    if config.validation.every_steps == 0:
        found["validation.samples"] = 0
    return found


def identity_with_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity completed by the defaults of options that did not exist when it was stored."""
    defaults = identity(TrainConfig(output_dir=".", data=DataOptions(path=".")))  # a recipe needs both
    for method in known_methods():
        options: Any = method.Options(method=method.name)
        defaults |= {f"adapter.{key}": value for key, value in flat(options.identity()).items()}
    return {**defaults, "adapter.method": "prime", "adapter.residual": False, **found}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first key in which two identities differ; None if they belong to the same run.

    The location of the data, the spelling of a path, and moving a base's folder make no difference.
    """
    whole, wanted = identity_with_defaults(before), identity_with_defaults(now)
    keys = sorted({*whole, *wanted} - {*_DATA_PLACES})
    return next((key for key in keys if not _agree(key, whole.get(key), wanted.get(key))), None)


def _agree(key: str, before: Any, now: Any) -> bool:
    if key in _PATHS and before and now:
        was_moved = os.path.isabs(before) and not os.path.exists(before) and os.path.exists(now)
        if key in _MOVABLE and was_moved:
            return True
        before, now = os.path.realpath(before), os.path.realpath(now)
    is_same: bool = before == now
    return is_same


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as a flat one with keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
