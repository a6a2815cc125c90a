"""Recipes without secrets in URLs, for the run's folder; and without folders of the machine, to publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from nexus_adapters.training.config import DataOptions, TrainConfig


def without_secrets(config: TrainConfig) -> TrainConfig:
    """The recipe as a run's folder keeps it: its URLs have no user, password or query.

    Signed URLs have their signature in the query.
    """
    return replace(config, data=data_without_secrets(config.data))


def data_without_secrets(data: DataOptions) -> DataOptions:
    """As `without_secrets`, for `[data]` alone."""
    return replace(data, shards=tuple(map(_without_query_and_user, data.shards)))


def without_folders(config: TrainConfig) -> TrainConfig:
    """The recipe as it is published: as `without_secrets`, and with the folders' last parts alone."""
    config = without_secrets(config)
    shards = tuple(shard if "://" in shard else Path(shard).name for shard in config.data.shards)
    return replace(
        config,
        output_dir=Path(config.output_dir).name,
        imports=tuple(map(_name, config.imports)),
        base=replace(config.base, path=_name(config.base.path), config=_name(config.base.config)),
        adapter=replace(config.adapter, start_from=_name(config.adapter.start_from)),
        data=replace(config.data, path=_name(config.data.path), shards=shards),
        cache=replace(config.cache, folder=""),
    )


def _without_query_and_user(shard: str) -> str:
    if "://" not in shard:
        return shard
    parts = urlsplit(shard)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _name(path: str) -> str:
    return Path(path).name if path and Path(path).exists() else path
