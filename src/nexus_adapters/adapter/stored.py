"""Tensors as they lie in safetensors files, and the hash that tells whether they are still the same.

Nothing here imports torch: commands that only look at a file start fast.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

HASH = "sha256"  # the hash's name in a file's metadata
_READ_BYTES = 1 << 20
_ALIGNMENT = 8  # bytes that a header's length is a multiple of


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file. `dtype` as written there, such as "F16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Stored:
    """What a safetensors file says of itself: its tensors by name, and its metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: Path, argument: str = "path") -> Stored:
    """The header of a safetensors file; ValueError for what is none, or ends early."""
    try:
        with safe_open(file, framework="np"):  # checks the header and that the bytes are all there
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{argument}: expected safetensors; received '{file}' ({error})") from error
    metadata = header.pop("__metadata__", {})
    data = 8 + length
    tensors = {
        name: StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"])
        )
        for name, entry in header.items()
    }
    return Stored(tensors, metadata)


def hash_tensors(tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256, the same for the same weights, however they are sharded and described.

    Over each tensor, in sorted order of the names: dtype, space, shape joined by commas, newline, in ASCII;
    then the bytes as stored.
    """
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(f"{tensor.dtype} {','.join(map(str, tensor.shape))}\n".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            left = tensor.end - tensor.start
            while left > 0 and (block := stream.read(min(left, _READ_BYTES))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def check_hash(files: Iterable[Path], argument: str = "path") -> str | None:
    """The hash that the files of one save have in their metadata; None where they have none.

    Raises ValueError where the tensors have another one, or the files are not all of one save.
    """
    files = list(files)
    stored = [read_header(file, argument) for file in files]
    told = {each.metadata.get(HASH) for each in stored}
    if told == {None}:
        return None
    tensors = {name: tensor for each in stored for name, tensor in each.tensors.items()}
    found = hash_tensors(tensors)
    if told != {found}:
        where = f"'{files[0]}'" if len(files) == 1 else f"{len(files)} files in '{files[0].parent}'"
        raise ValueError(
            f"{argument}: expected tensors with the SHA-256 {', '.join(sorted(map(str, told)))}, which the "
            f"metadata of {where} tells; received {found}: damaged, changed, or of several saves"
        )
    return found


def add_hash(files: Iterable[Path]) -> str:
    """Write the hash of all their tensors into the metadata of each file; the hash."""
    files = list(files)
    tensors = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
    found = hash_tensors(tensors)
    for file in files:
        add_metadata(file, {HASH: found})
    return found


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add to a safetensors file's metadata; the file is replaced whole, or stays as it was."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        # Sorted, since the library writes them in any order: the same save gives the same bytes.
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **metadata}.items()))
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("wb") as out:
                out.write(len(encoded).to_bytes(8, "little") + encoded)
                shutil.copyfileobj(stream, out, length=_READ_BYTES)
                out.flush()
                os.fsync(out.fileno())
            shutil.copymode(file, partial)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
