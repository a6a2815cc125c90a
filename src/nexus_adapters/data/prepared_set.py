"""Reading what `nexus prepare` has made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nexus_adapters.data.prepare.folder import INDEX
from nexus_adapters.data.tars import TarSource


def open_prepared(
    folder: str | os.PathLike[str], condition: str, index_folder: str | os.PathLike[str]
) -> TarSource:
    """The samples of a prepared set with one of its maps.

    Args:
        folder: of the set.
        condition: name of the maps.
        index_folder: where `TarSource` keeps its indices.

    Raises:
        ValueError: for a folder without an index (one that is not finished, or something else), a map that
            the set does not have, and shards that are missing or of another size than the index says.
    """
    path = Path(folder)
    index = _read_index(path)
    conditions, shards = index["conditions"], index["shards"]
    if condition not in conditions:
        raise ValueError(
            f"condition: expected one of {', '.join(conditions)}, as '{folder}' has; received '{condition}'"
        )
    sizes = {path / shard["file"]: shard["bytes"] for shard in shards}
    for shard, size in sizes.items():
        if not shard.is_file() or shard.stat().st_size != size:
            found = f"{shard.stat().st_size}" if shard.is_file() else "none"
            raise ValueError(f"path: expected '{shard}' of {size} bytes; received {found}")
    return TarSource(
        [str(shard) for shard in sizes],
        image_column=index["image_format"],
        condition_column=f"{condition}.png",
        caption_column="json:captions",
        index_folder=index_folder,
    )


def options_of(folder: str | os.PathLike[str], condition: str) -> dict[str, Any]:
    """The options by which a set's maps were drawn. ValueError as `open_prepared`."""
    options: dict[str, Any] = _read_index(Path(folder))["settings"]["conditions"][condition]
    return options


def _read_index(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        reason = "which is not finished" if (path / ".unfinished").exists() else f"which has no {INDEX}"
        raise ValueError(f"path: expected a set that nexus prepare has made; received '{path}', {reason}")
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
        for key in ("conditions", "image_format", "shards", "settings"):
            index[key]
    except (ValueError, KeyError, TypeError) as error:
        message = f"path: expected an {INDEX} of nexus prepare; received '{path / INDEX}' ({error})"
        raise ValueError(message) from error
    return index
