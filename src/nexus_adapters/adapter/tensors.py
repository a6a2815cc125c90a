"""The tensors in an adapter's files, whoever saved them, and a T2I-Adapter's as the trunk of a Nexus adapter.

Of pickles only tensors are read: no code in them runs.
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

# What training wrappers put in front of names, in any order: DDP, torch.compile, the attribute of a module.
_WRAPPER = re.compile(r"^(?:(?:module|_orig_mod)\.)+")
_FRONT = re.compile(r"^(?:(?:module|_orig_mod|adapter|model)\.)+")
# Under which keys training scripts nest the tensors in a pickle.
_NESTED = ("state_dict", "adapter", "model", "module")
_DEEPEST = 4  # how often that is nested
_MOST_NAMES = 8  # of what a pickle holds, in an error
_ORIGINAL = re.compile(r"body\.(\d{1,3})\.(in_conv|block1|block2)\.(weight|bias)", re.ASCII)
_LIGHT = re.compile(r"body\.\d{1,3}\.out_conv\..+", re.ASCII)
_ORIGINAL_LIGHT = re.compile(r"(body\.\d{1,3}\.)body\.(\d{1,3}\..+)", re.ASCII)
UNITS = 2  # residual units of a stage


def adapter_names(names: Collection[str]) -> dict[str, str]:
    """Each name in an adapter's file -> the name that diffusers gives that tensor; empty for what is none.

    Read are Nexus adapters and T2I-Adapters in diffusers' names, and T2I-Adapters, the light ones among them,
    as first published, whose residual units are numbered through, two per stage: `body.{2 * i + j}` is unit j
    of stage i. Either may have the prefixes that DDP, torch.compile and training scripts add.

    Raises `InvalidArgument` named "source" where two names become one.
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
    """Of a tensor of a T2I-Adapter as first published, by its stage; names that are none of these stay."""
    part = _ORIGINAL.fullmatch(name)
    if part is None:
        return f"adapter.{name}"
    stage, unit = divmod(int(part[1]), UNITS)
    place = "" if part[2] == "in_conv" else f"resnets.{unit}."
    return f"adapter.body.{stage}.{place}{part[2]}.{part[3]}"


def stem_for_colors(
    weight: Float[Tensor, "c u k k"], in_channels: int
) -> Float[Tensor, "c {in_channels}*u k k"]:
    """A stem for maps of one channel as one for `in_channels`; it gives the same on grey maps.

    The pixels of each channel lie in a block of their own (PixelUnshuffle).
    """
    return weight.repeat(1, in_channels, 1, 1) / in_channels


def split_kernel(
    kernel: Float[Tensor, "c c 3 3"], groups: int
) -> tuple[Float[Tensor, "c c_group 3 3"], Float[Tensor, "c c 1 1"]]:
    """The grouped 3x3 and the dense 1x1 whose sum is nearest to a plain 3x3, in least squares.

    Within the groups the sum is exact. Between them only the middle of the kernel has a place, in the 1x1;
    where both have one, the two share it equally (the solution of least norm).
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
    """The trunk of a Prime (`groups` 1) or Slim from a T2I-Adapter's tensors, in diffusers' names.

    `grey_to`: channels that a stem for one channel is to read; None leaves the stem as it is. Slim's
    convolutions have no bias, so those of the 3x3 are left out, with what `split_kernel` has no place for.
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


_PICKLE = b"\x80"  # the first byte of pickles since protocol 2
_ZIP = b"PK\x03\x04"


def load_adapter_tensors(saved: Saved) -> dict[str, Tensor]:
    """All tensors of an adapter's files, in the names of diffusers.

    `InvalidArgument` named "source": what is no Nexus or T2I-Adapter is described by what it seems to be.
    """
    tensors = load_tensors(saved)
    names = adapter_names(tensors)
    if not names:
        raise InvalidArgument(
            "source", "an adapter", f"'{saved.path}', which seems to be {seems_to_be(tensors)}"
        )
    return {new: tensors[name] for name, new in names.items()}


def load_tensors(saved: Saved) -> dict[str, Tensor]:
    """All tensors of an adapter's files in the names that they have there.

    `InvalidArgument` named "source" where they are not those that were saved, and for what has none.
    """
    tensors: dict[str, Tensor] = {}
    if all(file.suffix == ".safetensors" for file in saved.files):
        check_hash(saved.files, "source")
    for file in saved.files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    return tensors


def tensor_names(saved: Saved) -> frozenset[str]:
    """The names in an adapter's files, those of Nexus and T2I-Adapters as `adapter_names` gives them.

    Of safetensors from the header, of a pickle by reading it. Empty where they cannot be read, or are not
    clear: `load_adapter_tensors` says why.
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
    """The tensors in a pickle, also where they are nested in what a training script saved."""
    expect(_may_be_pickled(file), "source", "tensors", f"'{file}', which has none")
    try:
        if zipfile.is_zipfile(file):  # torch does not compare the checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            expect(
                damaged is None,
                "source",
                "undamaged tensors",
                f"'{file}', where {damaged} has a wrong checksum",
            )
        content = torch.load(file, map_location="cpu", weights_only=True)
    except InvalidArgument:
        raise
    except pickle.UnpicklingError as error:
        raise InvalidArgument(
            "source", "pickled tensors and nothing else", f"'{file}', a pickle with code", "It was not run"
        ) from error
    except Exception as error:  # of damaged files torch raises nearly anything
        reason = one_line(error)
        raise InvalidArgument("source", "tensors", f"'{file}', which cannot be read ({reason})") from error
    return _only_tensors(content, file)


def _only_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """The only mapping of tensors in what a training script saved; an optimizer's do not count.

    `InvalidArgument` named "source" where there is none, or several could be meant.
    """
    found = dict(_mappings(content, (), set()))
    adapters = {keys: tensors for keys, tensors in found.items() if _may_be_adapter(tensors)}
    readable = {keys: tensors for keys, tensors in found.items() if set(keys) <= set(_NESTED)}
    chosen = adapters or readable
    expected = f"tensors by name, by themselves or under {', '.join(_NESTED[:-1])} or {_NESTED[-1]}"
    if len(chosen) > 1:
        places = " and ".join(shown(".".join(keys)) if keys else "the top level" for keys in chosen)
        hint = "Save the one that you want to a file by itself"
        raise InvalidArgument("source", expected, f"'{file}', with tensors in {places}", hint)
    if not chosen or not set(chosen) <= set(readable):
        keys = list(content)[:_MOST_NAMES] if isinstance(content, Mapping) else []
        names = f" of {', '.join(map(shown, keys))}" if keys else ""
        received = f"'{file}', a {type(content).__name__}{names}"
        hint = "Save the adapter's tensors to a file by themselves" if adapters else ""
        raise InvalidArgument("source", expected, received, hint)
    return next(iter(chosen.values()))


def _mappings(
    content: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Each mapping in `content` that has tensors by name, more than counters, and under which keys it is."""
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
    except InvalidArgument:  # an adapter, some of whose tensors are there twice
        return True


def _may_be_pickled(file: Path) -> bool:
    """Whether it begins as what `torch.save` writes does, now or in its first years."""
    with open_regular(file) as stream:
        return stream.read(len(_ZIP)).startswith((_PICKLE, _ZIP)) or zipfile.is_zipfile(file)
