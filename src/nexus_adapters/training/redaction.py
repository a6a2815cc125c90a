"""Recipes without secrets in URLs, for the run's folder; and without folders of the machine, to publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from nexus_adapters.errors import redacted
from nexus_adapters.files import without_folder
from nexus_adapters.training.config import DataOptions, TrainConfig


def without_secrets(config: TrainConfig) -> TrainConfig:
    """The recipe as a run's folder keeps it: its URLs have no user, password or query.

    Signed URLs have their signature in the query.
    """
    return replace(config, data=data_without_secrets(config.data))


def data_without_secrets(data: DataOptions) -> DataOptions:
    """As `without_secrets`, for `[data]` alone."""
    return replace(data, path=redacted(data.path), shards=tuple(map(redacted, data.shards)))


def without_folders(config: TrainConfig) -> TrainConfig:
    """The recipe as it is published: as `without_secrets`, and with the last parts of paths alone."""
    config = without_secrets(config)
    shards = tuple(shard if "://" in shard else Path(shard).name for shard in config.data.shards)
    return replace(
        config,
        output_dir=without_folder(Path(config.output_dir).name),  # of Windows too
        imports=_without_folders(config.imports),
        base=_without_folders(config.base),
        adapter=_without_folders(config.adapter),
        data=_without_folders(replace(config.data, shards=shards)),
        cache=replace(config.cache, folder=""),
    )


def _without_folders(value: Any) -> Any:
    """All paths in a section, options of extractors among them, so that none is overlooked."""
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
