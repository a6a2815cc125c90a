"""A cache of tensors that are computed once and read in every step: safetensors shards in a folder.

An entry's name is a hash of all that it was computed from. So runs share entries, data sets may grow, and
what a killed run has finished is there for the next.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.files import STALE_AFTER_S, lock, remove_unfinished, save_tensors

_SHARD = "shard-*.safetensors"
_LOCK = ".writing-"  # and the name of the shard: held while it is written
_SEPARATOR = "/"


class TensorCache:
    """Entries of a few named tensors each, in `folder`, which is created where it is missing.

    Opening it reads headers alone; tensors are read when they are needed. It can be pickled for the processes
    of a DataLoader. Several processes may write to one folder.

    Raises:
        InvalidArgument: where `folder` is a file, cannot be written to, or has a shard that cannot be read.

    Warns:
        UserWarning: for a damaged shard, which gets another name: its entries are computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(
                "cache.folder", "a folder that can be created", f"'{folder}' ({error.strerror})"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InvalidArgument("cache.folder", "a folder that can be written to", f"'{folder}'")
        self._shard_of: dict[str, Path] = {}
        self._tensors_of: dict[str, tuple[str, ...]] = {}
        self._opened: dict[Path, Any] = {}
        self._remove_abandoned()
        self.refresh()

    def refresh(self) -> None:
        """Find shards that any process has written since."""
        known = set(self._shard_of.values())
        for shard in sorted(self.folder.glob(_SHARD)):
            if shard not in known:
                self._index(shard)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that have no entry, each once, in order."""
        return [name for name in dict.fromkeys(names) if name not in self]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add entries, as one shard that appears whole or not at all."""
        flat = {
            f"{name}{_SEPARATOR}{part}": tensor
            for name, tensors in entries.items()
            for part, tensor in tensors.items()
        }
        if not flat:
            return
        name = _SHARD.replace("*", secrets.token_hex(8))
        file = self.folder / f"{_LOCK}{name}"
        with ExitStack() as stack:
            stack.callback(file.unlink, missing_ok=True)
            with suppress(OSError, NotImplementedError):  # of a file system without locks
                stack.enter_context(lock(file))
            save_tensors(self.folder / name, flat)
        self._index(self.folder / name)

    def _remove_abandoned(self) -> None:
        """Delete what killed processes were writing: at once where their lock is free, else in time."""
        for file in self.folder.glob(f"{_LOCK}*"):
            with suppress(OSError, NotImplementedError), lock(file, wait=False) as is_free:
                if is_free:
                    remove_unfinished(self.folder, name=file.name.removeprefix(_LOCK))
                    file.unlink(missing_ok=True)
        remove_unfinished(self.folder, STALE_AFTER_S)

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry; KeyError where there is none."""
        return {part: self.read_part(name, part) for part in self._tensors_of[name]}

    def read_part(self, name: str, part: str) -> Tensor:
        """One tensor of an entry. KeyError where there is no such entry."""
        shard = self._shard_of[name]
        if shard not in self._opened:
            self._opened[shard] = safe_open(shard, framework="pt")
        tensor: Tensor = self._opened[shard].get_tensor(f"{name}{_SEPARATOR}{part}")
        return tensor

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                keys = sorted(file.keys())
        except SafetensorError as error:  # a shard appears whole or not at all, so the disk has damaged it
            aside = shard.with_name(f"{shard.name}.damaged")
            with suppress(FileNotFoundError):  # where another process has done the same
                shard.rename(aside)
            warnings.warn(
                f"cache: '{aside}' is damaged ({error}); its entries are computed again", stacklevel=2
            )
            return
        except OSError as error:
            raise InvalidArgument("cache.folder", "readable shards", f"'{shard}' ({error})") from error
        parts: dict[str, list[str]] = {}
        for key in keys:
            name, _, part = key.rpartition(_SEPARATOR)
            parts.setdefault(name, []).append(part)
        for name, names in parts.items():
            self._shard_of[name], self._tensors_of[name] = shard, tuple(names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # open files belong to a process
