"""Files: write atomically, read regular files, hash, lock; and the cache folder.

Files and folders that are being written or deleted have names that start with `.unfinished-`. A finished file
has the mode of the user's umask, even if a library, such as safetensors, makes it readable only by its owner.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from nexus_adapters.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

_Kind = TypeVar("_Kind")

LOCK = ".lock"
STALE_AFTER_S = 3600.0  # an unfinished file that has not changed for this long is abandoned
_UNFINISHED = ".unfinished-"
WEIGHTS = "diffusion_pytorch_model"
"""Start of weights' file names in diffusers format; followed by variant, shard numbers, and suffix."""


def cache_folder() -> Path:
    """Return the cache folder: `$XDG_CACHE_HOME/nexus-adapters`, by default `~/.cache/nexus-adapters`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexus-adapters"


def without_folder(path: str) -> str:
    """Return the last part of a path, to hide the user's folders; names, Hub ids and URLs stay."""
    if "://" in path or not path:
        return path
    is_path = path.startswith(("~", ".")) or PurePosixPath(path).root or PureWindowsPath(path).anchor
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_path or os.path.exists(path) else path


@contextmanager
def replacing_file(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield the path of an empty file that becomes `path` when the block ends without an error.

    For libraries that write to a path. The target of a symbolic link is replaced, not the link. After an
    error, `path` is unchanged, and no other file is left.

    Args:
        path: the file to write; missing parent folders are created.
        folder: where the file is written, on the same file system as `path`; by default next to it.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished((folder or target.parent) / target.name)
    try:
        unfinished.touch()  # not with `tempfile`, whose files are readable only by their owner
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        yield unfinished
        _sync(unfinished, mode)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a binary stream that replaces `path`, as `replacing_file`."""
    with replacing_file(path, folder) as unfinished, unfinished.open("wb") as stream:
        yield stream


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8, with the line ends of `text`."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write a JSON file atomically. Raises `ValueError` for numbers that are not finite."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises `OSError`, with the reason, if it fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # imports torch, which is slow and rarely needed

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors has its own temporary file next to the one it writes. In an unfinished folder, it is
    # recognized as a leftover if the process is killed.
    scratch = _unfinished(Path(os.path.realpath(path)))
    scratch.mkdir(parents=True)
    try:
        with replacing_file(path, scratch) as unfinished:
            save_file(whole, unfinished, metadata)
    except SafetensorError as error:  # usually, no space left on the device
        raise OSError(f"cannot write '{path}': {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` when the block ends without an error.

    An existing `target` is moved away first and deleted afterwards, so it is never a mix of both. Symbolic
    links and errors are handled as in `replacing_file`.
    """
    target = Path(os.path.realpath(target))
    aside = _unfinished(target)
    aside.mkdir(parents=True)
    try:
        yield aside
        mode = _mode_in(aside)
        for path in [*aside.rglob("*"), aside]:
            _sync(path, mode)
        replaced = target.rename(_unfinished(target)) if target.exists() else None
        try:
            aside.rename(target)
        except BaseException:
            if replaced is not None:
                replaced.rename(target)
            raise
        _sync(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder. If this is interrupted, no partial folder is left under its name."""
    shutil.rmtree(folder.rename(_unfinished(folder)), ignore_errors=True)


def remove_unfinished(folder: Path, idle_s: float = 0.0, name: str = "") -> None:
    """Delete what a killed process left in `folder`, except files that changed within `idle_s` seconds.

    Use `STALE_AFTER_S` for `idle_s` if other processes may be writing. `name` restricts it to leftovers of
    the file with this name.
    """
    for path in folder.glob(f"{_UNFINISHED}{name}*"):
        with suppress(OSError):  # deleted by another process, or open on a system that locks open files
            if idle_s == 0 or time.time() - path.stat().st_mtime > idle_s:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def is_leftover(name: str) -> bool:
    """Return whether this name is that of a lock or of an unfinished file, which a kill may leave."""
    return name == LOCK or name.startswith(_UNFINISHED)


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file, or a link to one, for unbuffered reading.

    Raises:
        OSError: if it cannot be read, and for devices, pipes and sockets, which may block or never end.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer. Devices are rejected before they are opened,
    # since opening some of them has side effects.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    stream = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # replaced in between
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stream


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Return the content of a regular file. Raises `OSError` as `open_regular`, and if above `most` bytes."""
    with open_regular(path) as stream:
        if most is not None and os.fstat(stream.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return stream.readall()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return files_sha256([path])


def files_sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the files' concatenated contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def folder_sha256(path: Path) -> str:
    """Return the SHA-256 of all files in a folder, by relative path and content; or of the file `path`."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
            digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def read_json_lines(path: Path, kind: type[_Kind]) -> list[_Kind]:
    """Return the lines of a JSON Lines file that hold a `kind`, such as dict; [] if there is no file.

    Lines that are not JSON are skipped, such as lines truncated by a kill or a power failure.
    """
    rows: list[Any] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, kind)]


def append_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Append a line for each row, in one call, so that lines of several processes do not mix.

    A truncated last line is terminated first. Missing folders are created.
    """
    content = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            content = content if stream.read(1) == b"\n" else b"\n" + content
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, and yield whether it is held.

    Without `wait`, it yields False if another process holds the lock. The lock file is kept. Missing folders
    are created.
    """
    from filelock import FileLock, Timeout  # not part of the core installation

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, timeout=-1 if wait else 0))
        except Timeout:
            yield False
        else:
            yield True


@contextmanager
def locked(folder: Path, argument: str) -> Iterator[None]:
    """Create and lock a folder. `InvalidArgument`, named `argument`, if another process is using it."""
    with lock(folder / LOCK, wait=False) as is_held:
        if not is_held:
            raise InvalidArgument(argument, "a folder that no other process is using", f"'{folder}'")
        yield


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{_UNFINISHED}{path.name}-{secrets.token_hex(4)}")


def _mode_in(folder: Path) -> int:
    """Return the mode of a new file in a folder. (Reading the umask would change it for all threads.)"""
    probe = _unfinished(folder / "mode")
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: Path, mode: int = 0) -> None:
    """Flush a file and its mode, or a folder's entries, to disk."""
    is_file = path.is_file()
    if is_file and mode not in (0, stat.S_IMODE(path.stat().st_mode)):  # some file systems cannot change it
        path.chmod(mode)
    if is_file or os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
