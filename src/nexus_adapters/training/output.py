"""A run's folder before and after: whose it is, who is at it, and whether it is finished."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nexus_adapters.training.config import DataOptions, TrainConfig
from nexus_adapters.training.public import without_secrets
from nexus_adapters.training.recipe import dump_config, load_recipe

ADAPTER, CONFIG, LOCK, FINISHED = "adapter", "config.toml", ".lock", "training.json"

# Fields that may change when a run goes on: how it is watched, stored and shared, and on what it runs.
_FREE_SECTIONS = ("cache", "checkpoint", "log", "hub")
_FREE_FIELDS = {
    "output_dir",
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
    for key, value in flat(dataclasses.asdict(without_secrets(config))).items():
        if key.split(".")[0] not in _FREE_SECTIONS and key not in free | _SHARED_BATCH:
            found[key] = list(value) if isinstance(value, tuple) else value
    if config.validation.every_steps == 0:
        found["validation.samples"] = 0
    return found


def with_defaults(found: Mapping[str, Any]) -> dict[str, Any]:
    """An identity from before an option existed, which had the option's default."""
    defaults = identity(TrainConfig(output_dir=".", data=DataOptions(path=".")))  # a recipe needs both
    return {**defaults, **found}


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
    """ValueError unless the folder is new, empty, or this very run's."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder; received '{folder}', which is a file")
    if (folder / CONFIG).is_file():
        _check_same(config, folder)
    elif folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if not _is_ours(p.name))):
        raise ValueError(
            f"output_dir: expected a new or empty folder, or that of a run; received '{folder}', which has "
            f"no {CONFIG} but {others[0]}"
        )


def finished_steps(config: TrainConfig) -> int | None:
    """The steps of a finished run in the folder; None where it is not there, or has further to go."""
    record = Path(config.output_dir) / ADAPTER / FINISHED
    if not record.is_file():
        return None
    found: Mapping[str, Any] = json.loads(record.read_bytes())
    is_whole = found["stopped_early"] or found["steps"] >= config.training.max_train_steps
    return int(found["steps"]) if is_whole else None


@contextmanager
def occupied(folder: Path, argument: str = "output_dir") -> Iterator[None]:
    """While open, no other run works in the folder. ValueError, which names the argument, where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"{argument}: expected a folder that no other run is using; received '{folder}'"
        ) from error


def write_config(config: TrainConfig) -> None:
    """Store the whole recipe, from which the run can be repeated."""
    file = Path(config.output_dir) / CONFIG
    partial = file.with_name(f"{CONFIG}.unfinished")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(dump_config(without_secrets(config)))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _is_ours(name: str) -> bool:
    """Whether a run that was killed before it had a config may have left it."""
    return name in (LOCK, f"{CONFIG}.unfinished")


def _check_same(config: TrainConfig, folder: Path) -> None:
    try:
        before = identity(load_recipe(folder / CONFIG))
    except ValueError as error:
        raise ValueError(
            f"output_dir: expected a run's folder; received '{folder}', whose {CONFIG} cannot be read "
            f"({error})"
        ) from error
    now = identity(config)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"output_dir: expected a new folder for {key}={now.get(key)!r}; received '{folder}', where a "
                f"run has {before.get(key)!r}"
            )
