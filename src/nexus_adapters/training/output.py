"""A run's folder before and after: whose it is, who is at it, and whether it is finished."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import is_leftover, write_text
from nexus_adapters.methods import known_methods
from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.public import without_secrets
from nexus_adapters.training.recipe import dump_config, load_run_recipe

ADAPTER, CONFIG, FINISHED = "adapter", "config.toml", "training.json"

# Fields that may change when a run is resumed: how it is watched, stored and shared, and on what it runs.
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
}
# Only their product counts, with the number of processes; a checkpoint knows it.
_SHARED_BATCH = {"training.batch_size", "training.gradient_accumulation_steps"}


def identity(config: TrainConfig) -> dict[str, Any]:
    """The fields that decide the weights, by their keys; `validation.samples` counts 0 without validation."""
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


def with_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """An identity from before an option existed, which had the option's default."""
    defaults = identity(TrainConfig(output_dir=".", data=DataOptions(path=".")))  # a recipe needs both
    for method in known_methods():
        options: Any = method.Options(method=method.name)
        defaults |= {f"adapter.{key}": value for key, value in flat(options.identity()).items()}
    return {**defaults, "adapter.method": "prime", "adapter.residual": False, **found}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key by which two identities differ; None where they are of the same run."""
    whole, wanted = with_defaults(before), with_defaults(now)
    return next((key for key in sorted({*whole, *wanted}) if whole.get(key) != wanted.get(key)), None)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose keys are joined by dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_output(config: TrainConfig) -> None:
    """`InvalidArgument` unless the folder is new, empty, or this very run's."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument("output_dir", "a folder", f"'{folder}', which is a file")
    if (folder / CONFIG).is_file():
        _check_same(config, folder)
    elif folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if not is_leftover(p.name))):
        raise InvalidArgument(
            "output_dir",
            "a new or empty folder, or that of a run",
            f"'{folder}', which has no {CONFIG} but {others[0]}",
        )


def finished_steps(config: TrainConfig) -> int | None:
    """The steps of a finished run in the folder; None where it is not there, or has further to go."""
    record = Path(config.output_dir) / ADAPTER / FINISHED
    if not record.is_file():
        return None
    found: Mapping[str, Any] = json.loads(record.read_bytes())
    is_whole = found["stopped_early"] or found["steps"] >= config.training.max_train_steps
    return int(found["steps"]) if is_whole else None


def write_config(config: TrainConfig) -> None:
    """Store the whole recipe, from which the run can be repeated."""
    write_text(Path(config.output_dir) / CONFIG, dump_config(without_secrets(config)))


def _check_same(config: TrainConfig, folder: Path) -> None:
    try:
        before = identity(load_run_recipe(folder / CONFIG))
    except InvalidArgument as error:
        reason = InvalidArgument(error.name, error.expected, error.received)
        raise InvalidArgument(
            "output_dir",
            "a run's folder",
            f"'{folder}', whose {CONFIG} cannot be read ({reason})",
            error.hint,
        ) from error
    now = identity(config)
    key = differing(before, now)
    if key is not None:
        raise InvalidArgument(
            "output_dir",
            f"a new folder for {key}={with_defaults(now).get(key)!r}",
            f"'{folder}', whose run has {with_defaults(before).get(key)!r}",
        )
