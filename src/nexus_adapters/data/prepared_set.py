"""Reading what `nexus prepare` has made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nexus_adapters.data.prepare.folder import INDEX
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument


def open_prepared(
    folder: str | os.PathLike[str], condition: str, index_folder: str | os.PathLike[str]
) -> TarSource:
    """The samples of a prepared set with one of its maps.

    Args:
        folder: of the set.
        condition: name of the maps.
        index_folder: where `TarSource` keeps its indices.

    Raises:
        InvalidArgument: for a folder without an index (an unfinished set, or something else), a map that the
            set does not have, and shards that are missing or whose size differs from the index.
    """
    path = Path(folder)
    index = _read_index(path)
    conditions, shards = index["conditions"], index["shards"]
    if condition not in conditions:
        raise InvalidArgument(
            "condition", f"one of {', '.join(conditions)}, as '{folder}' has", f"'{condition}'"
        )
    sizes = {path / shard["file"]: shard["bytes"] for shard in shards}
    for shard, size in sizes.items():
        if not shard.is_file() or shard.stat().st_size != size:
            found = f"{shard.stat().st_size} bytes" if shard.is_file() else "no such file"
            raise InvalidArgument("folder", f"'{shard}' of {size} bytes", found)
    return TarSource(
        [str(shard) for shard in sizes],
        image_column=index["image_format"],
        condition_column=f"{condition}.png",
        caption_column="json:captions",
        index_folder=index_folder,
    )


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has the index file that `open_prepared` reads. Its content is not checked."""
    return (Path(folder) / INDEX).is_file()


def options_of(folder: str | os.PathLike[str], condition: str) -> dict[str, Any]:
    """The options that a set's maps were extracted with. InvalidArgument as `open_prepared`."""
    options: dict[str, Any] = _read_index(Path(folder))["settings"]["conditions"][condition]
    return options


def _read_index(path: Path) -> dict[str, Any]:
    if not is_prepared(path):
        is_begun = (path / ".unfinished").exists()
        raise InvalidArgument(
            "folder",
            "a finished set of nexus prepare",
            f"'{path}', which is not finished" if is_begun else f"'{path}', which has no {INDEX}",
            "Run the same nexus prepare command again to finish it" if is_begun else "",
        )
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
        for key in ("conditions", "image_format", "shards", "settings"):
            index[key]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
        raise InvalidArgument(
            "folder", f"an {INDEX} written by nexus prepare", f"'{path / INDEX}' ({reason})"
        ) from error
    return index
