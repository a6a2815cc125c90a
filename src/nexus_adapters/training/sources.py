"""The samples that a recipe names: opened, and fitted to its base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nexus_adapters.conditions import EXTRACTORS, find_extractor
from nexus_adapters.data.fitting import Fitting
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.geometry import Geometry
from nexus_adapters.data.prepared_set import open_prepared
from nexus_adapters.data.samples import Source
from nexus_adapters.data.scene_source import SceneSource
from nexus_adapters.data.table import TableSource
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument, renamed
from nexus_adapters.scenes.maps import MAPS
from nexus_adapters.training.config import DataOptions

# Arguments of sources -> keys of a recipe.
_KEYS = {
    "condition": "data.condition",
    "folder": "data.path",
    "path": "data.path",
    "shards": "data.shards",
    "split": "data.split",
    "config_name": "data.config_name",
    "revision": "data.revision",
    "image_column": "data.image_column",
    "condition_column": "data.condition_column",
    "caption_column": "data.caption_column",
    "index_folder": "cache.folder",
}


def open_source(data: DataOptions, cache_folder: Path) -> Source:
    """The samples that `[data]` names; `InvalidArgument` where they are not there. Nothing is decoded."""
    columns = {
        "image_column": data.image_column or None,
        "condition_column": data.condition_column or None,
        "caption_column": data.caption_column or None,
    }
    given: dict[str, Any] = {name: column for name, column in columns.items() if column}
    if data.kind == "scenes":  # whose canny an extractor draws, with its options; other maps are exact
        return SceneSource(data.count, condition=None if data.condition == "canny" else data.condition)
    with renamed(_KEYS):
        if data.kind == "prepared":
            return open_prepared(data.path, data.condition, cache_folder / "tars")
        if data.kind == "folder":
            return FolderSource(data.path, **given)
        if data.kind == "tars":
            return TarSource(data.shards, index_folder=cache_folder / "tars", **given)
        return TableSource(
            data.path,
            split=data.split,
            config_name=data.config_name or None,
            revision=data.revision or None,
            **given,
        )


def known_hashes_file(data: DataOptions, cache_folder: Path) -> Path:
    """Where the content hashes of this data set's samples are kept, each data set's in a file of its own."""
    named = hashlib.sha256(json.dumps([data.kind, data.path, data.shards]).encode()).hexdigest()
    return cache_folder / "hashes" / f"{named[:32]}.jsonl"


def open_samples(data: DataOptions, cache_folder: Path, multiple: int) -> Fitting:
    """The samples as they are trained on, with sides that are multiples of `multiple` pixels.

    Raises `InvalidArgument` for an unknown extractor that is needed, and for a resolution that does not fit.
    """
    if data.kind == "scenes":
        _check_scenes(data)
    elif data.kind != "prepared" and not data.condition_column and data.condition not in EXTRACTORS:
        known = ", ".join(sorted(EXTRACTORS))
        raise InvalidArgument(
            "data.condition", f"one of {known}, or a data.condition_column", repr(data.condition)
        )
    if not data.condition_column and data.condition in EXTRACTORS:
        _check_options(data)
    if data.resolution % multiple:
        raise InvalidArgument(
            "data.resolution", f"a multiple of {multiple}, as the base needs", data.resolution
        )
    geometry = (
        Geometry.bucketed(data.resolution, step=multiple)
        if data.aspect_buckets
        else Geometry(data.resolution, data.resolution)
    )
    return Fitting(open_source(data, cache_folder), geometry, data.condition, data.extractor)


def _check_options(data: DataOptions) -> None:
    with renamed(lambda name: "data.extractor" if name == "options" else f"data.extractor.{name}"):
        find_extractor(data.condition).check_options(data.extractor)


def _check_scenes(data: DataOptions) -> None:
    if data.condition not in MAPS:
        raise InvalidArgument(
            "data.condition", f"one of {', '.join(MAPS)}, for data.kind 'scenes'", repr(data.condition)
        )
    if data.condition != "canny" and data.extractor:
        raise InvalidArgument(
            "data.extractor",
            f"no options, since scenes have exact maps for {data.condition}",
            repr(dict(data.extractor)),
        )
