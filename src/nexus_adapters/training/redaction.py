"""Remove secrets in URLs from recipes in a run's folder, and local paths from recipes to be published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from nexus_adapters.errors import redacted
from nexus_adapters.files import without_folder
from nexus_adapters.training.config import DataOptions, TrainConfig


def without_secrets(config: TrainConfig) -> TrainConfig:
    """Return the recipe without user, password and query in its URLs, as it is kept in a run's folder.

    The query of a signed URL contains the signature.
    """
    return replace(config, data=data_without_secrets(config.data))


def data_without_secrets(data: DataOptions) -> DataOptions:
    """Return `[data]` without secrets, as `without_secrets` does for the whole recipe."""
    return replace(data, path=redacted(data.path), shards=tuple(map(redacted, data.shards)))


def without_folders(config: TrainConfig) -> TrainConfig:
    """Return the recipe to publish: as `without_secrets`, and with only the last part of each path."""
    config = without_secrets(config)
    shards = tuple(shard if "://" in shard else Path(shard).name for shard in config.data.shards)
    return replace(
        config,
        output_dir=without_folder(Path(config.output_dir).name),  # also for Windows paths
        imports=_without_folders(config.imports),
        base=_without_folders(config.base),
        adapter=_without_folders(config.adapter),
        data=_without_folders(replace(config.data, shards=shards)),
        cache=replace(config.cache, folder=""),
    )


def _without_folders(value: Any) -> Any:
    """Shorten all paths in a section, including an extractor's options, so that none is overlooked."""
    if isinstance(value, str):
        return without_folder(value)
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_without_folders, value))
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return replace(value, **{name: _without_folders(each) for name, each in own.items()})
    return value
