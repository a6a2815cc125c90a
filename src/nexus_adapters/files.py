"""Files: written whole or not at all, read where they are regular, hashed, locked; and the folder of caches.

What is being written or deleted has a name that begins with `.unfinished-`. A finished file has the mode that
the user's umask asks for, even where a library, such as safetensors, lets only the owner read it.
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
STALE_AFTER_S = 3600.0  # nobody is still writing to a file that has not changed for so long
_UNFINISHED = ".unfinished-"
WEIGHTS = "diffusion_pytorch_model"
"""In diffusers' layout; then an optional variant, shard numbers, and the suffix."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/nexus-adapters`, or else in `~/.cache`; for what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexus-adapters"


def without_folder(path: str) -> str:
    """The last part of a path, for what others will see; names, Hub ids and URLs as they are."""
    if "://" in path or not path:
        return path
    is_path = path.startswith(("~", ".")) or PurePosixPath(path).root or PureWindowsPath(path).anchor
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if is_path or os.path.exists(path) else path


@contextmanager
def replacing_file(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """The name of an empty file that becomes `path` when the block ends without an error.

    For libraries that write to a name. A symbolic link stays, and what it points to is replaced. After an
    error `path` is what it was, and nothing else is left.

    Args:
        path: missing folders above it are made.
        folder: where the file is written, on the file system of `path`; by default next to it.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished((folder or target.parent) / target.name)
    try:
        unfinished.touch()  # not by `tempfile`, whose files only their owner may read
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        yield unfinished
        _sync(unfinished, mode)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """As `replacing_file`, a stream."""
    with replacing_file(path, folder) as unfinished, unfinished.open("wb") as stream:
        yield stream


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 with the line ends that `text` has, whole or not at all."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all. ValueError for numbers that are not finite: JSON has none."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. OSError, with the reason, where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # imports torch, which takes long and is seldom needed

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors has a temporary file of its own next to the one it writes. In a folder that is unfinished as
    # a whole, what a kill leaves of it is known for what it is.
    scratch = _unfinished(Path(os.path.realpath(path)))
    scratch.mkdir(parents=True)
    try:
        with replacing_file(path, scratch) as unfinished:
            save_file(whole, unfinished, metadata)
    except SafetensorError as error:  # no space left on the device, above all
        raise OSError(f"cannot write '{path}': {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends without an error.

    A `target` that exists is moved aside before and deleted after: it is never half one and half the other.
    Symbolic links and errors are treated as in `replacing_file`.
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
    """Delete a folder; where that is interrupted, no half of it is left under its name."""
    shutil.rmtree(folder.rename(_unfinished(folder)), ignore_errors=True)


def remove_unfinished(folder: Path, idle_s: float = 0.0, name: str = "") -> None:
    """Delete what a killed process has left in `folder`, but for what has changed within `idle_s` seconds.

    Where other processes may be writing, `idle_s` is `STALE_AFTER_S`. `name`: of the file that was being
    written, where it is that one alone.
    """
    for path in folder.glob(f"{_UNFINISHED}{name}*"):
        with suppress(OSError):  # another process was faster, or it is open on a system that keeps such files
            if idle_s == 0 or time.time() - path.stat().st_mtime > idle_s:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a file of this name may come from a process that was killed before it had written any other."""
    return name == LOCK or name.startswith(_UNFINISHED)


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file, or a link to one, to read it unbuffered.

    Raises:
        OSError: for what cannot be read, and for devices, pipes and sockets, which might never end, or never
            begin.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer. Devices are looked at first: to open some of
    # them has effects.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    stream = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # replaced in between
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stream


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file. OSError as `open_regular`, and for more than `most` bytes."""
    with open_regular(path) as stream:
        if most is not None and os.fstat(stream.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return stream.readall()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    return files_sha256([path])


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def folder_sha256(path: Path) -> str:
    """SHA-256 of all files below a folder, by their names in it and their contents; or of the file `path`."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
            digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def read_json_lines(path: Path, kind: type[_Kind]) -> list[_Kind]:
    """The lines of a file that hold a `kind`, such as dict; none where there is no file.

    Lines that a kill or a loss of power has cut short are skipped, and so is all else that is not JSON.
    """
    rows: list[Any] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, kind)]


def append_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Append a line for each row, in one call, so that lines of several processes do not mix.

    A last line that a kill has cut short is ended first. Missing folders are made.
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
    """Hold the lock file `path`; whether it is held, which without `wait` it is not where another holds it.

    The file stays where it is, for whoever holds it next. Missing folders are made.
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
    """Make the folder, and keep other processes out of it. InvalidArgument where one is at work there."""
    with lock(folder / LOCK, wait=False) as is_held:
        if not is_held:
            raise InvalidArgument(argument, "a folder that no other process is using", f"'{folder}'")
        yield


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{_UNFINISHED}{path.name}-{secrets.token_hex(4)}")


def _mode_in(folder: Path) -> int:
    """The mode of a new file in a folder. To ask for the umask is to change it, for all threads."""
    probe = _unfinished(folder / "mode")
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: Path, mode: int = 0) -> None:
    """Bring a file, with its mode, or the names in a folder to the disk."""
    is_file = path.is_file()
    if is_file and mode not in (0, stat.S_IMODE(path.stat().st_mode)):  # some file systems cannot change it
        path.chmod(mode)
    if is_file or os.name == "posix":  # Windows opens no folders
        descriptor = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
