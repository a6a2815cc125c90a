"""Read the tensors in an adapter's files, and turn a T2I-Adapter's into the trunk of a Nexus adapter.

Only tensors are read from pickles: no code in them runs.
"""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from nexus_adapters.adapter.arguments import shown
from nexus_adapters.adapter.saved import Saved
from nexus_adapters.adapter.weights import check_hash
from nexus_adapters.bases.parts import seems_to_be
from nexus_adapters.errors import InvalidArgument, expect, one_line
from nexus_adapters.files import open_regular

# Prefixes that training wrappers add to names, in any order: DDP, torch.compile, a module's attribute.
_WRAPPER = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_FRONT = re.compile(r"^(?:(?:module|_orig_mod|adapter|model)\.)+")
# Keys under which training scripts nest the tensors in a pickle.
_NESTED = ("state_dict", "adapter", "model", "module")
_DEEPEST = 4  # levels of nesting
_MOST_NAMES = 8  # keys of a pickle to show in an error
_ORIGINAL = re.compile(r"body\.(\d{1,3})\.(in_conv|block1|block2)\.(weight|bias)", re.ASCII)
_LIGHT = re.compile(r"body\.\d{1,3}\.out_conv\..+", re.ASCII)
_ORIGINAL_LIGHT = re.compile(r"(body\.\d{1,3}\.)body\.(\d{1,3}\..+)", re.ASCII)
UNITS = 2  # residual units per stage


def adapter_names(names: Collection[str]) -> dict[str, str]:
    """Map each tensor name in an adapter's file to diffusers' name; return {} if it is not an adapter.

    Known are Nexus adapters and T2I-Adapters with diffusers' names, and T2I-Adapters (full and light) as
    first published, which number their residual units consecutively, two per stage: `body.{2 * i + j}` is
    unit j of stage i. Names may have the prefixes that DDP, torch.compile and training scripts add.

    Raises:
        InvalidArgument: named "source", if two tensors would get the same name.
    """
    bare = {name: _FRONT.sub("", name) for name in names}
    starts = {name.split(".")[0] for name in bare.values()}
    is_light = any(_LIGHT.fullmatch(name) for name in bare.values())
    if "body" not in starts or not ("conv_in" in starts or is_light):
        return {}
    unwrapped = {name: _WRAPPER.sub("", name) for name in names}
    if any(_ORIGINAL.fullmatch(name) and ".block" in name for name in bare.values()):
        found = {name: _stage_name(plain) for name, plain in bare.items()}
    elif any(_ORIGINAL_LIGHT.fullmatch(name) for name in bare.values()):
        found = {name: "adapter." + _ORIGINAL_LIGHT.sub(r"\1resnets.\2", bare[name]) for name in names}
    elif any(name.startswith("adapter.body.") for name in unwrapped.values()):
        found = unwrapped  # a subclass may have tensors next to the trunk
    else:
        found = {name: f"adapter.{plain}" for name, plain in bare.items()}
    for new, count in Counter(found.values()).items():
        twins = " and ".join(name for name in found if found[name] == new) if count > 1 else ""
        expect(not twins, "source", "each tensor once", twins)
    return found


def _stage_name(name: str) -> str:
    """Return diffusers' name for a tensor of a T2I-Adapter as first published."""
    part = _ORIGINAL.fullmatch(name)
    if part is None:
        return f"adapter.{name}"
    stage, unit = divmod(int(part[1]), UNITS)
    place = "" if part[2] == "in_conv" else f"resnets.{unit}."
    return f"adapter.body.{stage}.{place}{part[2]}.{part[3]}"


def stem_for_colors(
    weight: Float[Tensor, "c u k k"], in_channels: int
) -> Float[Tensor, "c {in_channels}*u k k"]:
    """Expand a stem for one-channel maps to `in_channels`; on gray maps, the output stays the same.

    Each channel's pixels are contiguous in the stem's input (PixelUnshuffle).
    """
    return weight.repeat(1, in_channels, 1, 1) / in_channels


def split_kernel(
    kernel: Float[Tensor, "c c 3 3"], groups: int
) -> tuple[Float[Tensor, "c c_group 3 3"], Float[Tensor, "c c 1 1"]]:
    """Return the grouped 3x3 and the dense 1x1 kernel whose sum is the least-squares fit to a plain 3x3.

    Within a group, the sum is exact. Between groups, only the center of the kernel is kept, in the 1x1.
    Centers within a group are split equally between both kernels (the minimum-norm solution).
    """
    channels = len(kernel)
    width = channels // groups
    grouped = torch.cat(
        [kernel[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)]
    )
    pointwise = kernel[:, :, 1:2, 1:2].clone()
    for g in range(groups):
        rows = slice(g * width, (g + 1) * width)
        pointwise[rows, rows] /= 2
    grouped = grouped.clone()
    grouped[:, :, 1, 1] /= 2
    return grouped, pointwise


def trunk_tensors(
    tensors: Mapping[str, Tensor], groups: int, grey_to: int | None = None
) -> dict[str, Tensor]:
    """Turn a T2I-Adapter's tensors, with diffusers' names, into the trunk of a Prime (`groups` 1) or Slim.

    `grey_to` is the number of channels to which a one-channel stem is expanded; None keeps the stem. Slim's
    convolutions have no bias, so the biases of the 3x3 convolutions are dropped, as is the part of the
    kernels that `split_kernel` cannot keep.
    """
    trunk: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "adapter.conv_in.weight" and grey_to is not None:
            trunk[name] = stem_for_colors(tensor, grey_to)
        elif groups > 1 and name.endswith("block1.weight"):
            grouped, pointwise = split_kernel(tensor, groups)
            trunk[name.replace("block1.weight", "block1.gwc.weight")] = grouped
            trunk[name.replace("block1.weight", "block1.pwc.weight")] = pointwise
        elif not (groups > 1 and name.endswith("block1.bias")):
            trunk[name] = tensor
    return trunk


_PICKLE = b"\x80"  # first byte of a pickle of protocol 2 or later
_ZIP = b"PK\x03\x04"


def load_adapter_tensors(saved: Saved) -> dict[str, Tensor]:
    """Load all tensors of an adapter's files, with diffusers' names.

    Raises:
        InvalidArgument: named "source", if it is neither a Nexus adapter nor a T2I-Adapter; the error says
            what the file seems to be.
    """
    tensors = load_tensors(saved)
    names = adapter_names(tensors)
    if not names:
        raise InvalidArgument(
            "source", "an adapter", f"'{saved.path}', which seems to be {seems_to_be(tensors)}"
        )
    return {new: tensors[name] for name, new in names.items()}


def load_tensors(saved: Saved) -> dict[str, Tensor]:
    """Load all tensors of an adapter's files, with the names in the files.

    Raises:
        InvalidArgument: named "source", if the files have no tensors, or were changed after saving.
    """
    tensors: dict[str, Tensor] = {}
    if all(file.suffix == ".safetensors" for file in saved.files):
        check_hash(saved.files, "source")
    for file in saved.files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    return tensors


def tensor_names(saved: Saved) -> frozenset[str]:
    """Return the tensor names in an adapter's files, mapped by `adapter_names` if it is an adapter.

    Reads only the header of safetensors files, but all of a pickle. Returns an empty set if the names cannot
    be read or are ambiguous; `load_adapter_tensors` then reports why.
    """
    try:
        if all(file.suffix == ".safetensors" for file in saved.files):
            names = frozenset(saved.tensors)
        else:
            names = frozenset(name for file in saved.files for name in _unpickled(file))
        return frozenset(adapter_names(names).values()) or names
    except InvalidArgument:
        return frozenset()


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Load the tensors in a pickle, including those nested in what a training script saved."""
    expect(_may_be_pickled(file), "source", "tensors", f"'{file}', which has none")
    try:
        if zipfile.is_zipfile(file):  # torch does not verify checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            expect(
                damaged is None,
                "source",
                "undamaged tensors",
                f"'{file}', in which {damaged} has a wrong checksum",
            )
        content = torch.load(file, map_location="cpu", weights_only=True)
    except InvalidArgument:
        raise
    except pickle.UnpicklingError as error:
        raise InvalidArgument(
            "source", "pickled tensors only", f"'{file}', a pickle with code", "The code was not run"
        ) from error
    except Exception as error:  # for damaged files, torch raises nearly anything
        reason = one_line(error)
        raise InvalidArgument("source", "tensors", f"'{file}', which cannot be read ({reason})") from error
    return _only_tensors(content, file)


def _only_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the only mapping of tensors in what a training script saved, except the optimizer's.

    `InvalidArgument` named "source" if there is none, or more than one.
    """
    found = dict(_mappings(content, (), set()))
    adapters = {keys: tensors for keys, tensors in found.items() if _may_be_adapter(tensors)}
    readable = {keys: tensors for keys, tensors in found.items() if set(keys) <= set(_NESTED)}
    chosen = adapters or readable
    expected = f"tensors by name, at the top level or under {', '.join(_NESTED[:-1])} or {_NESTED[-1]}"
    if len(chosen) > 1:
        places = " and ".join(shown(".".join(keys)) if keys else "the top level" for keys in chosen)
        hint = "Save the tensors that you want to a separate file"
        raise InvalidArgument("source", expected, f"'{file}', with tensors in {places}", hint)
    if not chosen or not set(chosen) <= set(readable):
        keys = list(content)[:_MOST_NAMES] if isinstance(content, Mapping) else []
        names = f" with {', '.join(map(shown, keys))}" if keys else ""
        received = f"'{file}', a {type(content).__name__}{names}"
        hint = "Save the adapter's tensors to a separate file" if adapters else ""
        raise InvalidArgument("source", expected, received, hint)
    return next(iter(chosen.values()))


def _mappings(
    content: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the keys and the content of each mapping of tensors in `content` that are not only counters."""
    if not isinstance(content, Mapping) or len(keys) > _DEEPEST or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if any(tensor.ndim for tensor in tensors.values()) and all(isinstance(key, str) for key in tensors):
        yield keys, tensors
    for key, value in content.items():
        yield from _mappings(value, (*keys, str(key)), seen)


def _may_be_adapter(names: Collection[str]) -> bool:
    try:
        return bool(adapter_names(names))
    except InvalidArgument:  # an adapter with duplicate tensors
        return True


def _may_be_pickled(file: Path) -> bool:
    """Return whether the file starts like a file of `torch.save`, of any version."""
    with open_regular(file) as stream:
        return stream.read(len(_ZIP)).startswith((_PICKLE, _ZIP)) or zipfile.is_zipfile(file)
