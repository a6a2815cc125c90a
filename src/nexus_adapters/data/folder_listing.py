"""What an image folder lists: by its metadata.jsonl, or by a text file beside each image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from nexus_adapters.conditions.images import FORMATS
from nexus_adapters.data.columns import as_captions, no_column
from nexus_adapters.errors import InvalidArgument

METADATA = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class Listed:
    """A sample's files, relative to the folder. `captions`: None where a text beside the image has them."""

    image: str
    condition: str | None
    captions: tuple[str, ...] | None


def read_metadata(
    folder: Path, image_column: str, condition_column: str | None, caption_column: str
) -> list[Listed]:
    """The samples of a folder's metadata.jsonl, in its order; whether the files are there is not looked at.

    Raises:
        InvalidArgument: for a line that is no JSON object, misses a column, or has captions of a wrong type
            or paths that leave the folder; it names the line, from 1 on.
    """
    listed = []
    columns = {"image_column": image_column, "condition_column": condition_column}
    for where, row in _rows(folder / METADATA):
        paths = []
        for argument, column in columns.items():
            paths.append(None if column is None else _path(row, argument, column, where))
        captions = as_captions(_value(row, "caption_column", caption_column, where))
        if captions is None:
            shown = f"{json.dumps(row[caption_column])[:60]} as '{caption_column}' in {where}"
            raise InvalidArgument("caption_column", "a string or a list of at least one string", shown)
        listed.append(Listed(paths[0] or "", paths[1], captions))
    return listed


def list_images(folder: Path) -> list[Listed]:
    """All images in a folder and below, sorted by path, hidden ones excepted."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (Path(parent, name) for name in names if not name.startswith("."))
        found += [image for image in images if image.suffix.lower() in endings]
    return [Listed(path, None, None) for path in sorted(p.relative_to(folder).as_posix() for p in found)]


def _rows(metadata: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Each line's object, and what errors call the line; lines without anything are passed over."""
    try:
        with metadata.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"line {number} of '{metadata}'"
                    yield where, _row(line, where)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("folder", f"a {METADATA} in UTF-8", f"'{metadata}' ({error})") from error


def _row(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(
            "folder", "a JSON object per line", f"{where}, which is not JSON ({error})"
        ) from error
    if not isinstance(row, dict):
        raise InvalidArgument("folder", "a JSON object per line", f"{where}, which is a {type(row).__name__}")
    return row


def _value(row: dict[str, object], argument: str, column: str, where: str) -> object:
    if column not in row:
        raise no_column(argument, column, row, where)
    return row[column]


def _path(row: dict[str, object], argument: str, column: str, where: str) -> str:
    path = _value(row, argument, column, where)
    if not isinstance(path, str) or not path or _leaves_folder(path):
        raise InvalidArgument(
            argument,
            "a path below the folder, relative to it",
            f"{json.dumps(path)[:200]} as '{column}' in {where}",
        )
    return path


def _leaves_folder(path: str) -> bool:
    """As either system reads it: a data set may have been made on the other."""
    windows, posix = PureWindowsPath(path), PurePosixPath(path)
    return bool(windows.anchor) or posix.is_absolute() or ".." in windows.parts
