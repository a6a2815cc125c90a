"""The files of a local folder: listed through links, found under names of other systems, kept inside."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from nexus_adapters.data.ignored import Ignored
from nexus_adapters.errors import InvalidArgument

OUTSIDE_HINT = "With allow_outside = true (--allow-outside of nexus prepare) it is read all the same"
_READ_ALREADY = "links to folders that are read already"


def list_files(folder: Path, ignored: Ignored) -> dict[str, bool]:
    """All regular files in a folder and below, sorted: path relative to it -> whether it is a link.

    Links to folders and to files are followed; each folder is read once, by its own name before those of
    links to it, so that links that lead back end. Hidden files and folders are left out.
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
                ignored.add("links to nothing" if is_link and not exists(entry.path) else _IRREGULAR, path)
    return dict(sorted(files.items()))


_IRREGULAR = "devices, pipes or sockets"


def check_regular(folder: Path, argument: str) -> None:
    """InvalidArgument for a folder with devices, pipes or sockets, which libraries would read."""
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir() and path.exists():
            raise InvalidArgument(argument, "regular files", f"'{path}', which is a device, pipe or socket")


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file; False, too, for names that no file can have."""
    try:
        return os.path.exists(path)
    except ValueError:  # a null byte
        return False


def find_path(folder: Path, path: str, known: Collection[str] = ()) -> str:
    """The path that is there: `path` as it is, with slashes for backslashes, or in another Unicode form.

    A table may come from Windows, and from systems that compose accents otherwise (NFC, NFD).

    Args:
        folder: that the path is relative to.
        path: as a table names it.
        known: files that exist, whose names need no look at the disk.

    Returns:
        `path` itself where nothing is there.
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
    """Whether a path leads out, read as Windows and as POSIX read it: a table may be of either."""
    windows, posix = PureWindowsPath(path), PurePosixPath(path)
    return bool(windows.anchor) or posix.is_absolute() or ".." in windows.parts


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, with all links followed, lies below `folder` or next to where it seems to lie.

    The second is for folders that are links themselves: they are the user's own.
    """
    target = Path(os.path.realpath(file))
    return any(target.is_relative_to(os.path.realpath(parent)) for parent in (folder, file.parent))


def check_inside(file: Path, folder: Path, argument: str, allow_outside: bool) -> None:
    """InvalidArgument for a text that is a link out of its folder, and might be anything of the user's."""
    if not allow_outside and not is_inside(file, folder):
        raise InvalidArgument(
            argument,
            f"captions and metadata in '{folder}'",
            f"'{file}', a link to '{os.path.realpath(file)}'",
            OUTSIDE_HINT,
        )
