"""Which recipes are of the same run: the fields that decide the weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from nexus_adapters.methods import known_methods
from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.redaction import without_secrets

# Fields that may change when a run is resumed: they decide how it is monitored, stored and executed.
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
# Where things are. The data are compared by content, and all else by the whole path.
_DATA_PLACES = ("data.path", "data.shards")
HELD_OUT = "held_out"  # samples, where earlier versions held out another number of them
_PATHS = ("base.path", "base.config", "adapter.start_from")
_MOVABLE = ("base.path", "base.config")  # since a base's content is compared, too
# Only their product with the number of processes counts, and checkpoints store it.
_SHARED_BATCH = {"training.batch_size", "training.gradient_accumulation_steps"}


def identity(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide the weights, by key; without validation, `validation.samples` is 0."""
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
    """An identity with the defaults of options that did not exist when it was stored."""
    defaults = identity(TrainConfig(output_dir=".", data=DataOptions(path=".")))  # a recipe needs both
    for method in known_methods():
        options: Any = method.Options(method=method.name)
        defaults |= {f"adapter.{key}": value for key, value in flat(options.identity()).items()}
    return {**defaults, "adapter.method": "prime", "adapter.residual": False, **found}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key by which two identities differ; None if they are of the same run.

    Where the data are does not count, nor how a path is written, nor that a base's folder was moved.
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
    """Nested mappings as one, whose keys are joined by dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
