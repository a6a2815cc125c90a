"""An adapter's weights files: headers, the hash in their metadata, saving and verified loading.

Nothing here imports torch: commands that only look at a file start fast.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import WEIGHTS, open_regular, replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

HASH = "sha256"  # the hash's name in a file's metadata
_READ_BYTES = 1 << 20
_MOST_NAMES = 8  # tensors to name in an error
# For each type in `FLOATS`: an integer type of the same size, and the bits of the exponent.
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
# Types that weights may have: safetensors' name -> torch's name.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_ALIGNMENT = 8  # bytes that a header's length is a multiple of
PATH = "pretrained_model_name_or_path"
"""diffusers' name of the argument that names the files."""
_UPLOAD = {"repo_id", "commit_message", "private", "token", "create_pr"}  # options of `push_to_hub`


def variant_in_name(file: Path) -> str | None:
    """Return diffusers' `variant` in a file name: "fp16" for diffusion_pytorch_model.fp16.safetensors."""
    between = file.stem.removeprefix(WEIGHTS)
    return re.sub(r"-\d{5}-of-\d{5}$", "", between).lstrip(".") or None


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file: bytes `start` to `end`, with a `dtype` such as "F16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file: its tensors by name, and its metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(file: Path, argument: str = "path") -> SafetensorsHeader:
    """Read the header of a safetensors file.

    Raises:
        InvalidArgument: named `argument`, if the file is not safetensors or is truncated.
    """
    try:
        open_regular(file).close()  # safe_open maps devices and waits for pipes
        with safe_open(file, framework="np"):  # checks the header and the file's length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(argument, "a safetensors file", f"'{file}' ({one_line(error)})") from error
    metadata = header.pop("__metadata__", {})
    data = 8 + length
    tensors = {
        name: TensorEntry(
            file, entry["dtype"], tuple(entry["shape"]), *(data + offset for offset in entry["data_offsets"])
        )
        for name, entry in header.items()
    }
    return SafetensorsHeader(tensors, metadata)


def hash_tensors(tensors: Mapping[str, TensorEntry]) -> str:
    """Return a SHA-256 of the weights that does not depend on sharding or metadata.

    It covers each tensor, in sorted order of the names: dtype, space, shape joined by commas, newline,
    in ASCII; then the bytes as stored.
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
    """Check the hash in the metadata of one save's files, and return it; None if there is no hash.

    Raises:
        InvalidArgument: named `argument`, if the tensors or the other files do not match it.
    """
    files = list(files)
    headers = [read_header(file, argument) for file in files]
    stated = {header.metadata.get(HASH) for header in headers}
    if stated == {None}:
        return None
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    found = hash_tensors(tensors)
    where = f"'{files[0]}'" if len(files) == 1 else f"{len(files)} files in '{files[0].parent}'"
    expect(
        stated == {found},
        argument,
        f"tensors with the SHA-256 in the metadata, {', '.join(sorted(map(str, stated)))}",
        f"{found} in {where}",
        "The tensors are damaged, changed, or from several saves",
    )
    return found


def check_types(tensors: Mapping[str, TensorEntry], argument: str) -> None:
    """Raise `InvalidArgument`, named `argument`, unless all weights have a type in `FLOATS`."""
    for name, tensor in tensors.items():
        found = f"'{tensor.file}', in which {name} is {tensor.dtype}"
        expect(tensor.dtype in FLOATS, argument, f"weights in {' or '.join(FLOATS.values())}", found)


def check_finite(tensors: Mapping[str, TensorEntry], argument: str) -> None:
    """Raise `InvalidArgument`, named `argument`, unless all weights are finite. Types are in `FLOATS`."""
    import numpy as np

    for name, tensor in tensors.items():
        kind, exponent = _EXPONENTS[tensor.dtype]  # all ones for infinity and NaN
        left = (tensor.end - tensor.start) // np.dtype(kind).itemsize
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            while left > 0 and len(block := np.fromfile(stream, kind, min(left, _READ_BYTES))):
                left -= len(block)
                is_finite = bool(((block & exponent) != exponent).all())
                found = f"'{tensor.file}', in which some of {name} are not finite"
                expect(is_finite, argument, "weights that are finite numbers", found)


def add_hash(files: Iterable[Path]) -> str:
    """Write the hash of all tensors into the metadata of each file, and return it."""
    files = list(files)
    tensors = {name: tensor for file in files for name, tensor in read_header(file).tensors.items()}
    found = hash_tensors(tensors)
    for file in files:
        add_metadata(file, {HASH: found})
    return found


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a safetensors file, which is replaced atomically."""
    with replacing(file) as out, file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        # Sorted, so that the same save gives the same bytes: the library's order varies.
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **metadata}.items()))
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(stream, out, length=_READ_BYTES)


def save_with_hash(
    save: Callable[..., Any], push: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any
) -> None:
    """Save a model with diffusers, and add the hash of all its tensors to each of its weights files.

    Args:
        save: the model's `ModelMixin.save_pretrained`.
        push: its `push_to_hub`, called last so that the uploaded files have the hash.
        folder: where to save.
        *args: further arguments of `save`.
        **kwargs: further keyword arguments of `save`.

    Raises:
        InvalidArgument: for `safe_serialization=False`: pickles can contain code and are never loaded.
    """
    given = inspect.signature(save).bind(folder, *args, **kwargs).arguments
    is_safe = given.get("safe_serialization", True)
    expect(is_safe is True, "safe_serialization", "True", repr(is_safe), "Pickles can contain code")
    before = _weights_files(folder)
    more = given.pop("kwargs", {})
    upload = {name: value for name, value in more.items() if name in _UPLOAD}
    pushes = bool(given.pop("push_to_hub", False))
    try:
        save(**given, **{name: value for name, value in more.items() if name not in _UPLOAD})
    except SafetensorError as error:  # for example, no space left on the device
        raise OSError(f"cannot write '{folder}': {one_line(error)}") from error
    new = [file for file, state in _weights_files(folder).items() if before.get(file) != state]
    if new and given.get("is_main_process", True):
        add_hash(sorted(new))
    if pushes:
        push(**{"repo_id": folder.name} | upload, variant=given.get("variant"))


def _weights_files(folder: Path) -> dict[Path, tuple[int, bool]]:
    """Return the weights files in a folder, with their modification time and whether they have a hash."""
    files = folder.glob(f"{WEIGHTS}*.safetensors")
    return {file: (file.stat().st_mtime_ns, _has_hash(file)) for file in files}


def _has_hash(file: Path) -> bool:
    try:
        return HASH in read_header(file).metadata
    except InvalidArgument:  # a damaged file, which is probably about to be overwritten
        return False


def load_checked(load: Callable[..., Any], path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a model with diffusers, and check that the files had all of its tensors and no others.

    diffusers itself leaves missing tensors uninitialized and only logs it.

    Args:
        load: the class's `ModelMixin.from_pretrained`.
        path: a folder or Hub id.
        **kwargs: further arguments of `load`. With `output_loading_info=True`, the result is (model, info).

    Raises:
        InvalidArgument: names the tensors that are missing, unexpected, misshapen or not finite.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    # Misshapen tensors are still rejected, but this way diffusers reports all of them, not just the first.
    kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = load(path, **kwargs)
    except NotImplementedError:
        # A device map moves the model before the info is returned, and parameters that were not loaded cannot
        # be moved. Load again without it to find out whether that is the reason.
        for name in ("device_map", "max_memory"):
            kwargs.pop(name, None)
        model, info = load(path, **kwargs)
        check_loaded(model, info, path, PATH)
        raise
    check_loaded(model, info, path, PATH)
    return (model, info) if wants_info else model


def check_files(files: Iterable[Path], model: "nn.Module") -> list[str]:
    """Check files that are about to be loaded into a model, and return the names of their tensors.

    Raises:
        InvalidArgument: for files that are not safetensors, and for tensors that were changed after saving.
    """
    files = list(files)
    for file in files:
        expect(
            file.suffix == ".safetensors",
            PATH,
            "a safetensors file, which cannot contain code",
            f"'{file}'",
            "`nexus convert` reads the tensors of a pickle without running code",
        )
    headers = [read_header(file, PATH) for file in files]
    found = {name: tensor.shape for header in headers for name, tensor in header.tensors.items()}
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for header in headers:
        check_types({n: tensor for n, tensor in header.tensors.items() if n in floating}, PATH)
    if found == needed:
        check_hash(files, PATH)  # otherwise `check_loaded` reports more
    return list(found)


def check_loaded(
    adapter: "nn.Module", info: Mapping[str, Any], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless exactly the model's tensors were loaded, by diffusers' loading info.

    `argument` is the name of the argument that gave the path.
    """
    # Parameters that are still on `meta` were not loaded, even if diffusers does not report them.
    left_empty = {name for name, tensor in adapter.named_parameters() if tensor.is_meta}
    left_empty -= _offloaded(adapter)
    misshapen = {
        f"{name} {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in info.get("mismatched_keys", ())
    }
    left_empty -= {name for name, _, _ in info.get("mismatched_keys", ())}
    missing = left_empty | set(info.get("missing_keys", ()))
    raise_for_tensors(missing, set(info.get("unexpected_keys", ())), misshapen, path, argument)
    _check_finite(dict(adapter.named_parameters()), path, argument)


def check_tensors(
    adapter: "nn.Module", tensors: Mapping[str, "Tensor"], path: str | os.PathLike[str], argument: str
) -> None:
    """Raise `InvalidArgument` unless these are exactly the adapter's tensors, all finite.

    Weights may have any type in `FLOATS`; a buffer of another type, such as a counter, must have that type.
    """
    needed = adapter.state_dict()
    misshapen = {
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(needed[name].shape)}"
        for name in set(needed) & set(tensors)
        if tensors[name].shape != needed[name].shape
    }
    raise_for_tensors(set(needed) - set(tensors), set(tensors) - set(needed), misshapen, path, argument)
    for name, tensor in tensors.items():
        kind = str(needed[name].dtype).removeprefix("torch.")
        allowed = FLOATS.values() if needed[name].is_floating_point() else (kind,)
        layout = str(tensor.layout).removeprefix("torch.")
        found = layout if layout != "strided" else str(tensor.dtype).removeprefix("torch.")
        is_plain = found in allowed and not tensor.is_meta
        received = f"'{path}', in which {name} is {found}"
        expect(is_plain, argument, f"weights in {' or '.join(allowed)}", received)
    _check_finite(tensors, path, argument)


def raise_for_tensors(
    missing: set[str],
    surplus: set[str],
    misshapen: set[str],
    path: str | os.PathLike[str],
    argument: str,
) -> None:
    """Raise `InvalidArgument`, named `argument`, with the first wrong tensors, if there are any."""
    problems = {"missing": missing, "unexpected": surplus, "misshapen": misshapen}
    found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
    if found:
        raise InvalidArgument(
            argument, "weights with exactly the tensors that the config needs", f"'{path}' ({found})"
        )


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


def _check_finite(tensors: Mapping[str, "Tensor"], path: str | os.PathLike[str], argument: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            found = f"'{path}', in which some of {name} are not finite"
            raise InvalidArgument(argument, "weights that are finite numbers", found)


def _offloaded(adapter: "nn.Module") -> set[str]:
    """Return the parameters that a device map offloads and accelerate's hooks load for each call."""
    names = set()
    for module_name, module in adapter.named_modules():
        elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None) or ()
        for name, _ in module.named_parameters(recurse=False):
            if name in elsewhere:
                names.add(f"{module_name}.{name}")
    return names
