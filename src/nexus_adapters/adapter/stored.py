"""Tensors as they lie in safetensors files, and the hash that shows whether they are still the same.

Nothing here imports torch: commands that only look at a file start fast.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.files import replacing

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
    """The header of a safetensors file.

    Raises `InvalidArgument`, for the argument of this name, where the file is no safetensors or ends early.
    """
    try:
        with safe_open(file, framework="np"):  # checks the header and that the bytes are all there
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidArgument(argument, "a safetensors file", f"'{file}' ({error})") from error
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

    Raises `InvalidArgument` where the tensors have another one, or the files are not all of one save.
    """
    files = list(files)
    stored = [read_header(file, argument) for file in files]
    stated = {each.metadata.get(HASH) for each in stored}
    if stated == {None}:
        return None
    tensors = {name: tensor for each in stored for name, tensor in each.tensors.items()}
    found = hash_tensors(tensors)
    where = f"'{files[0]}'" if len(files) == 1 else f"{len(files)} files in '{files[0].parent}'"
    expect(
        stated == {found},
        argument,
        f"tensors with the SHA-256 in the metadata, {', '.join(sorted(map(str, stated)))}",
        f"{found} in {where}",
        "The tensors are damaged, changed, or of several saves",
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
    with replacing(file) as out, file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        # Sorted, since the library writes them in any order: the same save gives the same bytes.
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **metadata}.items()))
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(stream, out, length=_READ_BYTES)
