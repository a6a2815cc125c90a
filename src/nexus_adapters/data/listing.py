"""The files of a local folder: list them through links, find paths from other systems, stay inside."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from nexus_adapters.data.ignored import Ignored
from nexus_adapters.errors import InvalidArgument

OUTSIDE_HINT = "To read it anyway, set allow_outside = true (--allow-outside for nexus prepare)"
_READ_ALREADY = "links to folders that have already been read"


def list_files(folder: Path, ignored: Ignored) -> dict[str, bool]:
    """Return all regular files in a folder and its subfolders, sorted: relative path -> whether it is a link.

    Links to folders and files are followed. Each folder is read once, if possible under its own name instead
    of a link's, so circular links end. Hidden files and folders are omitted.
    """
    files: dict[str, bool] = {}
    seen: set[tuple[int, int]] = set()
    links: list[str] = []
    waiting = [""]
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
        relative = waiting.pop() if waiting else links.pop()
        try:
            status = os.stat(folder / relative)
            if (status.st_dev, status.st_ino) in seen:
                ignored.add(_READ_ALREADY, relative)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / relative) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:
            ignored.add("folders that cannot be read", relative)
            continue
        for entry in sorted(visible, key=lambda entry: entry.name):
            path, is_link = f"{relative}/{entry.name}".lstrip("/"), entry.is_symlink()
            if entry.is_dir():
                (links if is_link else waiting).append(path)
            elif entry.is_file():
                files[path] = is_link
            else:
                ignored.add("broken links" if is_link and not exists(entry.path) else _IRREGULAR, path)
    return dict(sorted(files.items()))


_IRREGULAR = "devices, pipes or sockets"


def check_regular(folder: Path, argument: str) -> None:
    """Raise `InvalidArgument` for a folder with devices, pipes or sockets, which libraries would read."""
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir() and path.exists():
            raise InvalidArgument(argument, "regular files", f"'{path}', which is a device, pipe or socket")


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists; False also for names that no file can have."""
    try:
        return os.path.exists(path)
    except ValueError:  # a null byte
        return False


def find_path(folder: Path, path: str, known: Collection[str] = ()) -> str:
    """Find the file that a path means: `path` itself, or one with slashes or in another Unicode form.

    A table may have been written on Windows, or on a system that composes accents differently (NFC, NFD).

    Args:
        folder: the folder that the path is relative to.
        path: the path in a table.
        known: existing files, which are not looked up on disk.

    Returns:
        The path of the existing file, or `path` itself if there is none.
    """
    for name in _spellings(path):
        if name in known or exists(folder / name):
            return name
    return path


def _spellings(path: str) -> Iterator[str]:
    yield path
    slashed = path.replace("\\", "/")
    for form in (None, "NFC", "NFD"):
        yield slashed if form is None else unicodedata.normalize(form, slashed)


def leaves_folder(path: str) -> bool:
    """Return whether a path leads out of its folder on Windows or on POSIX; a table may be from either."""
    windows, posix = PureWindowsPath(path), PurePosixPath(path)
    return bool(windows.anchor) or posix.is_absolute() or ".." in windows.parts


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file, with all links followed, is inside `folder` or in the folder that it appears in.

    The latter allows folders that are links themselves, which the user created.
    """
    target = Path(os.path.realpath(file))
    return any(target.is_relative_to(os.path.realpath(parent)) for parent in (folder, file.parent))


def check_inside(file: Path, folder: Path, argument: str, allow_outside: bool) -> None:
    """Raise `InvalidArgument` for a text file that links out of its folder and could be any private file."""
    if not allow_outside and not is_inside(file, folder):
        raise InvalidArgument(
            argument,
            f"captions and metadata in '{folder}'",
            f"'{file}', a link to '{os.path.realpath(file)}'",
            OUTSIDE_HINT,
        )
