"""Adapters in others' formats: what a file is, and the adapter that is in it.

Read are folders and single files of this package, folders and state dicts of the public release of Nexus
(arXiv 2602.14514), and T2I-Adapters (arXiv 2302.08453) in diffusers' form and as first published, whose trunk
starts a Prime or Slim.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_adapters.adapter.arguments import (
    ARGUMENTS,
    FORMAT,
    FORMAT_VERSION,
    attention_heads,
    check_config,
    variant_arguments,
)
from nexus_adapters.adapter.blocks import constructor_keywords
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.saved import CONFIG_KEY, Saved, find_saved, within
from nexus_adapters.adapter.tensors import load_adapter_tensors, trunk_tensors
from nexus_adapters.adapter.weights import add_hash, check_tensors
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.files import replacing_file, save_tensors

# Side of the stem's pixel squares -> the kind of base that adapters with such a stem are usually for.
_STEMS = {8: "full_adapter", 16: "full_adapter_xl"}
_TEXT_WIDTHS = {"full_adapter": 768, "full_adapter_xl": 2048}


FROM_T2I = "a T2I-Adapter"  # the only kind of source that leaves something to choose


@dataclass(frozen=True)
class Imported:
    """An adapter, the format it was in, and what the conversion changed."""

    adapter: NexusAdapter
    kind: str
    notes: tuple[str, ...] = ()


def import_adapter(
    source: str | Path | Saved,
    variant: str = "prime",
    *,
    text_width: int | None = None,
    residual: bool | None = None,
    zero_init: bool = False,
    seed: int = 0,
) -> Imported:
    """The Nexus adapter in files of any format that is known here, or made of the T2I-Adapter in them.

    Args:
        source: as `find_saved` takes it: a folder, a file (.safetensors, .pth, .pt, .bin, .ckpt), a Hub id, a
            training run, a saved pipeline, or the name of an adapter of the package; or what that found.
        variant: "prime", "slim", "prime-paper" or "slim-paper": what a T2I-Adapter is the start of. Adapters
            of all other formats have their own.
        text_width: of the prompt embeddings, for a T2I-Adapter; None for that of the base it is usually for,
            768 with a stem of 8 x 8 pixels and 2048 with one of 16 x 16. Stable Diffusion 2.x needs 1024.
        residual: of a T2I-Adapter's Prime or Slim, the residual connection around the attention; None for
            what the variant says. False makes the paper's configuration of "prime" and "slim".
        zero_init: start the attention's output at zero, which needs the residual connection. A Prime then
            gives exactly what the T2I-Adapter gives, until it is trained.
        seed: of the norms' and attentions' initial values, for a T2I-Adapter.

    Raises:
        InvalidArgument: for anything else; it says what the file seems to be.
    """
    form = variant_arguments(variant, {} if residual is None else {"residual": residual})
    with renamed({"adapter": "source"}):
        saved = source if isinstance(source, Saved) else find_saved(source)
    kind = saved.class_name or "NexusAdapter"
    is_known = kind in ("NexusAdapter", "T2IAdapter")
    expected = "a NexusAdapter or a T2IAdapter"
    expect(is_known, "source", expected, f"'{saved.path}', which is a {kind}")
    tensors = load_adapter_tensors(saved)
    if "unshuffle" in saved.config:
        return Imported(_built(saved.config, tensors, saved.path), "a NexusAdapter")
    if any(".cross_attention." in name for name in tensors):
        return Imported(_from_release(tensors, saved), "an adapter of the public release")
    options = form | {"text_width": text_width, "zero_init": zero_init}
    return _from_t2i(tensors, saved, options, seed)


def export_file(adapter: NexusAdapter, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter into one safetensors file, whose metadata hold its config and the tensors' hash.

    Args:
        adapter: the adapter.
        file: ends in .safetensors; replaced whole.
        metadata: more of it, such as the base that the adapter was trained for.

    Raises:
        InvalidArgument: for a subclass, which the file could not say: use `save_pretrained`.
    """
    kind = type(adapter).__name__
    hint = "save_pretrained writes a folder that keeps the class"
    expect(type(adapter) is NexusAdapter, "adapter", "a NexusAdapter", f"a {kind}", hint)
    config = {name: adapter.config[name] for name in ARGUMENTS} | {FORMAT: FORMAT_VERSION}
    content = {"format": "pt", CONFIG_KEY: json.dumps(config), "variant": adapter.variant}
    content |= {FORMAT: str(FORMAT_VERSION), **(metadata or {})}
    with replacing_file(file) as unfinished:
        save_tensors(unfinished, adapter.state_dict(), content)
        add_hash([unfinished])


def _geometry(tensors: Mapping[str, Tensor], saved: Saved) -> dict[str, Any]:
    """`in_channels, channels, pools, unshuffle`, from the stem, the stages, and where needed the config."""
    stages = 1 + max(
        (int(name.split(".")[2]) for name in tensors if name.startswith("adapter.body.")), default=-1
    )
    channels = [
        len(_tensor(f"adapter.body.{i}.resnets.0.block2.weight", tensors, saved)) for i in range(stages)
    ]
    inputs = _tensor("adapter.conv_in.weight", tensors, saved).shape[1]
    stated = saved.config.get("downscale_factor")
    sides = [stated] if isinstance(stated, int) else [s for s in _STEMS if inputs in (s**2, 3 * s**2)]
    expect(
        len(sides) == 1 and sides[0] >= 1 and inputs % sides[0] ** 2 == 0,
        "source",
        "a stem for squares of 8 or 16 pixels of 1 or 3 channels, or a config whose downscale_factor fits it",
        f"a stem of {inputs} inputs in '{saved.path}'",
    )
    kind = saved.config.get("adapter_type", _STEMS.get(sides[0], "full_adapter"))
    pools = [int(i > 0 if kind == "full_adapter" else i == 2) for i in range(stages)]
    return {
        "in_channels": inputs // sides[0] ** 2,
        "channels": channels,
        "pools": pools,
        "unshuffle": sides[0],
    }


def _tensor(name: str, tensors: Mapping[str, Tensor], saved: Saved) -> Tensor:
    expect(name in tensors, "source", f"weights with {name}", f"'{saved.path}', which lacks it")
    return tensors[name]


def _from_release(tensors: Mapping[str, Tensor], saved: Saved) -> NexusAdapter:
    """The release's config is of little use: its `groups` may be wrong, and it has no heads.

    `InvalidArgument` named "source" for an adapter of this package that has lost its config, of which the
    tensors do not tell all that it says.
    """
    expect(
        not saved.has_hash,
        "source",
        "an adapter with its config",
        f"'{saved.path}', weights that this package wrote, without it",
        "Keep config.json next to the weights file",
    )
    geometry = _geometry(tensors, saved)
    inner, text_width = _tensor("adapter.body.0.cross_attention.to_k.weight", tensors, saved).shape
    grouped = tensors.get("adapter.body.0.resnets.0.block1.gwc.weight")
    heads, head_width = _heads(inner, geometry["channels"])
    if not saved.config:
        warnings.warn(
            f"adapter: '{saved.path}' has no config, and is read as an adapter of the public release: "
            f"without a residual connection, {heads} heads of width {head_width}",
            UserWarning,
            stacklevel=3,
        )
    arguments = geometry | {
        "groups": 1 if grouped is None else len(grouped) // grouped.shape[1],
        "text_width": text_width,
        "heads": heads,
        "head_width": head_width,
        "residual": False,
        "zero_init": False,
        "noise_exponent": 0.0,
    }
    return _built(arguments, tensors, saved.path)


def _heads(inner: int, channels: list[int]) -> tuple[int, int]:
    """Heads of a given inner width: those of the rule where it gives that width, else by the same widths."""
    heads, head_width = attention_heads(channels)
    if heads * head_width == inner:
        return heads, head_width
    return attention_heads([2 * inner])


def _from_t2i(tensors: Mapping[str, Tensor], saved: Saved, options: Mapping[str, Any], seed: int) -> Imported:
    geometry = _geometry(tensors, saved)
    is_grey = geometry["in_channels"] == 1
    kind = saved.config.get("adapter_type", _STEMS.get(geometry["unshuffle"], "full_adapter"))
    heads, head_width = attention_heads(geometry["channels"])
    arguments = geometry | dict(options) | {"heads": heads, "head_width": head_width}
    given = options["text_width"]
    arguments |= {"text_width": _TEXT_WIDTHS[kind] if given is None else given}
    arguments |= {"in_channels": 3} if is_grey else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        adapter: Any = NexusAdapter(**arguments)
    groups: int = options["groups"]
    trunk, lost = trunk_tensors(tensors, groups, grey_to=3 if is_grey else None)
    own = {k: v for k, v in adapter.state_dict().items() if ".norm1." in k or ".cross_attention." in k}
    check_tensors(adapter, own | trunk, saved.path, "source")
    adapter.load_state_dict(own | trunk)
    notes = ["norms and attention are new, and have to be trained"]
    if is_grey:
        notes.append("the stem read one channel and reads three, each a third of it: the same on grey maps")
    if groups > 1:
        notes.append(
            "Slim's convolutions are the nearest to the plain ones in least squares: their bias, and "
            f"{lost:.1%} of the kernels' squared norm, have no place in them"
        )
    return Imported(adapter.eval(), FROM_T2I, tuple(notes))


def _built(
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    kind: type[NexusAdapter] = NexusAdapter,
) -> NexusAdapter:
    try:
        if kind is NexusAdapter:
            check_config(arguments)
        given = {name: arguments[name] for name in constructor_keywords(kind) if name in arguments}
        with torch.device("meta"):
            adapter: Any = kind(**given)
    except InvalidArgument as error:
        raise within("source", "a valid config", path, error) from error
    check_tensors(adapter, tensors, path, "source")
    # Copies: those of a file stay tied to it.
    adapter.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    built: NexusAdapter = adapter.eval()
    return built


def build_adapter(
    saved: Saved, config: Mapping[str, Any], kind: type[NexusAdapter] = NexusAdapter
) -> NexusAdapter:
    """An adapter of the class `kind` and this config with the tensors of `saved`, all of them checked.

    `InvalidArgument` named "source".
    """
    return _built(config, load_adapter_tensors(saved), saved.path, kind)


def t2i_parts(saved: Saved) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of diffusers' `T2IAdapter`, and its tensors, from the files of one in any form.

    `InvalidArgument` named "source".
    """
    tensors = load_adapter_tensors(saved)
    geometry = _geometry(tensors, saved)
    is_xl = _STEMS.get(geometry["unshuffle"]) == "full_adapter_xl"
    arguments = {
        "in_channels": geometry["in_channels"],
        "channels": geometry["channels"],
        "num_res_blocks": 2,
        "downscale_factor": geometry["unshuffle"],
        "adapter_type": saved.config.get("adapter_type", "full_adapter_xl" if is_xl else "full_adapter"),
    }
    return arguments, tensors
