"""Import adapters in all known formats, and export single files.

Supported are folders and single files of this package, folders and state dicts of the public release of
Nexus (arXiv 2602.14514), and T2I-Adapters (arXiv 2302.08453) in diffusers format or as first published; their
trunk initializes a Prime or Slim. Nothing is guessed: for a state dict without a config, the caller names the
variant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, max_pool2d

from nexus_adapters.adapter.arguments import (
    ARGUMENTS,
    FORMAT,
    FORMAT_VERSION,
    attention_heads,
    variant_arguments,
)
from nexus_adapters.adapter.model import NexusAdapter, build_checked
from nexus_adapters.adapter.saved import CONFIG_KEY, Saved, find_saved
from nexus_adapters.adapter.t2i_files import TEXT_WIDTHS, build_t2i, is_light, shape_of, trunk_geometry
from nexus_adapters.adapter.tensors import UNITS, load_adapter_tensors, load_tensors, trunk_tensors
from nexus_adapters.adapter.weights import add_hash, check_tensors
from nexus_adapters.bases.parts import seems_to_be
from nexus_adapters.errors import expect, renamed
from nexus_adapters.files import replacing_file, save_tensors

_START = "prime"  # the default configuration to create from a T2I-Adapter
_MEASURED_ON = 32  # side of the first feature, in pixels
_ROUNDING = 1e-4  # relative to the features' norm: float32 rounding, with a margin


FROM_RELEASE = "an adapter of the public release"
FROM_T2I = "a T2I-Adapter"
_OPTIONS = ("variant", "text_width", "residual", "zero_init", "seed")


@dataclass(frozen=True)
class Imported:
    """An adapter, its source format, and notes on what the conversion changed.

    `options` names the arguments of `import_adapter` that were used; the source determines the others.
    """

    adapter: NexusAdapter
    kind: str
    notes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def import_adapter(
    source: str | Path | Saved,
    variant: str | None = None,
    *,
    text_width: int | None = None,
    residual: bool | None = None,
    zero_init: bool | None = None,
    seed: int = 0,
) -> Imported:
    """Load a Nexus adapter from files of any known format, or initialize one from a T2I-Adapter.

    Args:
        source: as in `find_saved`: a folder, a file (.safetensors, .pth, .pt, .bin, .ckpt), a Hub id, a
            training run, a saved pipeline, or the name of an embedded adapter; or the result of `find_saved`.
        variant: "prime", "slim", "prime-paper" or "slim-paper": the configuration to create from a
            T2I-Adapter, by default "prime". For the public release's weights without a config,
            "prime-paper" or "slim-paper" is required. Adapters in all other formats have their own.
        text_width: for a T2I-Adapter, the width of the prompt embeddings. None derives it from the usual
            base: 768 if the stem folds 8 x 8 pixels, 2048 if 16 x 16. Stable Diffusion 2.x needs 1024.
        residual: for a T2I-Adapter, whether the new adapter has a residual connection around the attention;
            None for the variant's value. False turns "prime" and "slim" into the paper's configurations.
        zero_init: for a T2I-Adapter, initialize the attention's output to zero, which needs the residual
            connection. An untrained Prime then gives exactly the T2I-Adapter's output. None: yes if there is
            a residual connection.
        seed: for a T2I-Adapter, the seed of the initial values of norms and attention.

    Returns:
        The adapter, with the source format and notes.

    Raises:
        InvalidArgument: for anything else; it says what the file seems to be.
    """
    overrides = {} if residual is None else {"residual": residual}
    form = variant_arguments(variant or _START, overrides)
    with renamed({"adapter": "source"}):
        saved = source if isinstance(source, Saved) else find_saved(source)
    kind = saved.class_name or "NexusAdapter"
    is_known = kind in ("NexusAdapter", "T2IAdapter")
    expected = "a NexusAdapter or a T2IAdapter"
    expect(is_known, "source", expected, f"'{saved.path}', a {kind}")
    if saved.is_nexus:
        return Imported(build_adapter(saved, saved.config), "a NexusAdapter")
    tensors = load_adapter_tensors(saved)
    has_attention = any(".cross_attention." in name for name in tensors)
    fits = not saved.class_name or has_attention == (saved.class_name == "NexusAdapter")
    expect(fits, "source", f"the tensors of a {kind}, as in its config", f"other tensors in '{saved.path}'")
    if has_attention:
        if "downscale_factor" in saved.config and not saved.has_hash:
            return Imported(_from_release(tensors, saved), FROM_RELEASE)
        _check_stated(variant, form, tensors, saved)
        return Imported(_from_release(tensors, saved), FROM_RELEASE, options=("variant", "residual"))
    expect(
        not is_light(tensors),
        "source",
        "an adapter",
        f"'{saved.path}', which seems to be {seems_to_be(tensors)}",
        "It has no trunk to start from; use it as it is with load_adapter, Control or --adapter",
    )
    options = form | {"text_width": text_width}
    options["zero_init"] = form["residual"] if zero_init is None else zero_init
    return _from_t2i(saved, tensors, options, seed)


def export_file(adapter: NexusAdapter, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter into one safetensors file; its metadata holds the config and the tensors' hash.

    Args:
        adapter: the adapter.
        file: a path that ends in .safetensors; an existing file is replaced atomically.
        metadata: further metadata, such as the base that the adapter was trained for.

    Raises:
        InvalidArgument: for a subclass, because the file cannot store its name: use `save_pretrained`.
    """
    kind = type(adapter).__name__
    hint = "save_pretrained writes a folder, which stores the class"
    expect(type(adapter) is NexusAdapter, "adapter", "a NexusAdapter", f"a {kind}", hint)
    config = {name: adapter.config[name] for name in ARGUMENTS} | {FORMAT: FORMAT_VERSION}
    content = {"format": "pt", CONFIG_KEY: json.dumps(config), "variant": adapter.variant}
    content |= {FORMAT: str(FORMAT_VERSION), **(metadata or {})}
    with replacing_file(file) as unfinished:
        save_tensors(unfinished, adapter.state_dict(), content)
        add_hash([unfinished])


def _check_stated(
    variant: str | None, form: Mapping[str, Any], tensors: Mapping[str, Tensor], saved: Saved
) -> None:
    """Reject weights without a config, unless the caller says that they are from the public release.

    A training checkpoint has the same tensor names, but may have a residual connection, another number of
    heads, or a noise exponent. The tensors show none of this.
    """
    hint = (
        "Keep config.json next to the weights and pass their folder, or pass the checkpoint in the folder of "
        "its run. `nexus convert --variant prime-paper` (or slim-paper) reads weights of the public release"
    )
    is_stated = variant is not None and not form["residual"] and not saved.has_hash
    found = f"'{saved.path}', weights without a config"
    expect(is_stated, "source", "an adapter with its config", found, hint)
    is_slim = "adapter.body.0.resnets.0.block1.gwc.weight" in tensors
    expected = f"{'slim' if is_slim else 'prime'}-paper, to match the tensors in '{saved.path}'"
    expect(is_slim == (form["groups"] > 1), "variant", expected, variant)


def _from_release(tensors: Mapping[str, Tensor], saved: Saved) -> NexusAdapter:
    """Build it from the tensors' shapes: the release's config has no heads, and its groups may be wrong."""
    geometry = trunk_geometry(tensors, saved)
    inner, text_width = shape_of("adapter.body.0.cross_attention.to_k.weight", 2, tensors, saved)
    grouped, groups = "adapter.body.0.resnets.0.block1.gwc.weight", 1
    if grouped in tensors:
        width, part, *_ = shape_of(grouped, 4, tensors, saved)
        groups = width // max(1, part)
    heads, head_width = _heads(inner, geometry["channels"])
    arguments = geometry | {
        "groups": groups,
        "text_width": text_width,
        "heads": heads,
        "head_width": head_width,
        "residual": False,
        "zero_init": False,
        "noise_exponent": 0.0,
    }
    return build_checked(arguments, tensors, saved.path)


def _heads(inner: int, channels: list[int]) -> tuple[int, int]:
    """Return (heads, head_width) for an inner width: by `attention_heads` of the channels if that fits it."""
    heads, head_width = attention_heads(channels)
    if heads * head_width == inner:
        return heads, head_width
    return attention_heads([2 * inner])


def _from_t2i(saved: Saved, tensors: Mapping[str, Tensor], options: Mapping[str, Any], seed: int) -> Imported:
    t2i = build_t2i(saved, tensors).float()
    units = t2i.config["num_res_blocks"]
    has_place = units == UNITS
    expected = f"a T2I-Adapter with {UNITS} residual blocks per level, like a Nexus adapter"
    expect(has_place, "source", expected, f"'{saved.path}' with {units}")
    geometry = trunk_geometry(tensors, saved)
    is_grey = geometry["in_channels"] == 1
    heads, head_width = attention_heads(geometry["channels"])
    arguments = geometry | dict(options) | {"heads": heads, "head_width": head_width}
    if options["text_width"] is None:
        arguments |= {"text_width": TEXT_WIDTHS[t2i.config["adapter_type"]]}
    arguments |= {"in_channels": 3} if is_grey else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        adapter: Any = NexusAdapter(**arguments)
    groups: int = options["groups"]
    # In float32: dividing the stem by three would round in half precision.
    trunk = trunk_tensors(t2i.state_dict(), groups, grey_to=3 if is_grey else None)
    own = {k: v for k, v in adapter.state_dict().items() if ".norm1." in k or ".cross_attention." in k}
    check_tensors(adapter, own | trunk, saved.path, "source")
    adapter.load_state_dict(own | trunk)
    notes = [
        f"before training, {_likeness(adapter.eval(), t2i)}",
        "its norms and attention are newly initialized",
    ]
    if is_grey:
        notes.append(
            "its one-channel stem was expanded to three channels, which gives the same output on gray maps"
        )
    if groups > 1:
        notes.append(
            "its convolutions are a least-squares fit to the T2I-Adapter's: they have no bias, and only the "
            "center of each kernel connects the groups"
        )
    return Imported(adapter, FROM_T2I, tuple(notes), _OPTIONS)


def _likeness(adapter: Any, t2i: Any) -> str:
    """Describe how close an adapter's features are to a T2I-Adapter's, measured on random line maps."""
    side = _MEASURED_ON * t2i.config["downscale_factor"]
    generator = torch.Generator().manual_seed(0)
    waves = interpolate(torch.randn(2, 1, 6, 6, generator=generator), (side, side), mode="bicubic")
    inside = (waves > 0).float()
    lines = max_pool2d(inside, 3, 1, 1) - inside  # white contours on black
    text = torch.randn(2, 8, adapter.config["text_width"], generator=generator)
    with torch.no_grad():
        found = adapter(lines.expand(-1, adapter.config["in_channels"], -1, -1), text)
        wanted = t2i(lines.expand(-1, t2i.config["in_channels"], -1, -1))
    pairs = [(ours.flatten(), theirs.flatten()) for ours, theirs in zip(found, wanted, strict=True)]
    errors = [float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)) for ours, theirs in pairs]
    if max(errors) < _ROUNDING:
        return "its features equal those of the T2I-Adapter"
    likeness = [float(cosine_similarity(ours, theirs, 0)) for ours, theirs in pairs]
    return (
        "its features differ from the T2I-Adapter's: on line maps, the cosine similarity per level, from "
        f"first to last, is {', '.join(f'{value:.3f}' for value in likeness)}, and the difference is "
        f"{min(errors):.0%} to {max(errors):.0%} of the features' norm"
    )


def build_adapter(
    saved: Saved, config: Mapping[str, Any], kind: type[NexusAdapter] = NexusAdapter
) -> NexusAdapter:
    """Build an adapter of the class `kind` with this config and the tensors of `saved`, all checked.

    Raises:
        InvalidArgument: named "source", if config and tensors do not fit.
    """
    return build_checked(config, load_tensors(saved), saved.path, kind)
