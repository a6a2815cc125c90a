"""An adapter's tensor files: names, headers, hashes, and whether they hold what the config needs.

Nothing here imports torch before it is needed: commands that only look at a file start fast.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nexus_adapters.errors import InvalidArgument, expect
from nexus_adapters.files import replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model"  # then an optional variant, shard numbers, and the suffix


def variant_in_name(file: Path) -> str | None:
    """What diffusers calls `variant`, such as "fp16" of diffusion_pytorch_model.fp16.safetensors."""
    between = file.stem.removeprefix(WEIGHTS)
    return re.sub(r"-\d{5}-of-\d{5}$", "", between).lstrip(".") or None


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


def check_loaded(
    adapter: "nn.Module", info: Mapping[str, Any], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless diffusers' loading info says that every tensor was loaded, and no other.

    `argument` is the one that named the path.
    """
    # Whatever diffusers may have overlooked: the parameter then stays on `meta`.
    left_empty = {name for name, tensor in adapter.named_parameters() if tensor.is_meta}
    left_empty -= _offloaded(adapter)
    misshapen = {
        f"{name} {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in info.get("mismatched_keys", ())
    }
    left_empty -= {name for name, _, _ in info.get("mismatched_keys", ())}
    missing = left_empty | set(info.get("missing_keys", ()))
    _raise_for(missing, set(info.get("unexpected_keys", ())), misshapen, path, argument)
    _check_finite(dict(adapter.named_parameters()), path, argument)


def check_tensors(
    adapter: "nn.Module", tensors: Mapping[str, "Tensor"], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless these are exactly the adapter's tensors, all of them finite."""
    needed = adapter.state_dict()
    misshapen = {
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(needed[name].shape)}"
        for name in set(needed) & set(tensors)
        if tensors[name].shape != needed[name].shape
    }
    _raise_for(set(needed) - set(tensors), set(tensors) - set(needed), misshapen, path, argument)
    _check_finite(tensors, path, argument)


def _raise_for(
    missing: set[str],
    surplus: set[str],
    misshapen: set[str],
    path: str | os.PathLike[str],
    argument: str,
) -> None:
    problems = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    found = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names)
    if found:
        raise InvalidArgument(
            argument, "weights with exactly the tensors that the config needs", f"'{path}' ({found})"
        )


def _check_finite(tensors: Mapping[str, "Tensor"], path: str | os.PathLike[str], argument: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            found = f"'{path}', where some of {name} are not finite"
            raise InvalidArgument(argument, "weights that are finite numbers", found)


def _offloaded(adapter: "nn.Module") -> set[str]:
    """The parameters that a device map has put aside, and that accelerate's hooks fetch for each call."""
    names = set()
    for module_name, module in adapter.named_modules():
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or ()
        for name, _ in module.named_parameters(recurse=False):
            if name in stored:
                names.add(f"{module_name}.{name}")
    return names
