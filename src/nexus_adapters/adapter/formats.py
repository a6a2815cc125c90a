"""Adapters in others' formats: what a file is, and the adapter that is in it.

Read are folders and single files of this package, folders and state dicts of the public release of Nexus
(arXiv 2602.14514), and T2I-Adapters (arXiv 2302.08453) in diffusers' form and as first published, whose trunk
starts a Prime or Slim.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nexus_adapters.adapter.arguments import ARGUMENTS, VARIANTS, attention_heads, check_config
from nexus_adapters.adapter.loaded import check_tensors
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.source_files import CONFIG_KEY, find_files, read_tensors
from nexus_adapters.adapter.stored import add_hash
from nexus_adapters.adapter.trunk import trunk_tensors

# Side of the stem's pixel squares -> the kind of base that adapters with such a stem are usually for.
_STEMS = {8: "full_adapter", 16: "full_adapter_xl"}
_TEXT_WIDTHS = {"full_adapter": 768, "full_adapter_xl": 2048}


@dataclass(frozen=True)
class Imported:
    """An adapter, and what there is to say of how it came about."""

    adapter: NexusAdapter
    kind: str
    notes: tuple[str, ...] = ()


def import_adapter(
    source: str | Path,
    variant: str = "prime",
    *,
    text_width: int | None = None,
    residual: bool = False,
    zero_init: bool = False,
    seed: int = 0,
) -> Imported:
    """The adapter in a folder or file of any format that is known here.

    Args:
        source: a folder with config.json and weights, or a file (.safetensors, .pth, .pt, .bin, .ckpt).
        variant: "prime" or "slim"; of what a T2I-Adapter is the start of. All others know their own.
        text_width: of the prompt embeddings, for a T2I-Adapter; None for that of the base it is usually for,
            768 with a stem of 8 x 8 pixels and 2048 with one of 16 x 16. Stable Diffusion 2.x needs 1024.
        residual: of a T2I-Adapter's Prime or Slim, the skip around the attention.
        zero_init: start the attention's output at zero. With `residual` a Prime then gives exactly what the
            T2I-Adapter gives, until it is trained.
        seed: of the norms' and attentions' initial values, for a T2I-Adapter.

    Raises:
        ValueError: for what is none of these; it says what the file seems to be.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source: expected a folder or a file; received '{source}', which does not exist")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}; received {variant!r}")
    config, files = find_files(path)
    tensors = read_tensors(files, path)
    if "unshuffle" in config:
        return Imported(_built(config, tensors, path), "a NexusAdapter")
    if any(".cross_attention." in name for name in tensors):
        return Imported(_from_release(tensors, config, path), "an adapter of the public release")
    options = {"text_width": text_width, "residual": residual, "zero_init": zero_init}
    return _from_t2i(tensors, config, path, VARIANTS[variant]["groups"], options, seed)


def export_file(adapter: NexusAdapter, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter into one safetensors file, whose metadata hold its config and the tensors' hash.

    Args:
        adapter: the adapter.
        file: ends in .safetensors; replaced whole.
        metadata: more of it, such as the base that the adapter was trained for.
    """
    config = {name: adapter.config[name] for name in ARGUMENTS}
    told = {"format": "pt", CONFIG_KEY: json.dumps(config), "variant": adapter.variant, **(metadata or {})}
    partial = file.with_name(f".{file.name}.unfinished")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}, partial, told)
        add_hash([partial])
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _geometry(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`in_channels, channels, pools, unshuffle`, from the stem, the stages, and where needed the config."""
    if any(".out_conv." in name for name in tensors):
        raise ValueError(
            f"source: expected a full adapter; received '{path}', a light T2I-Adapter, whose trunk is another"
        )
    stages = 1 + max(
        (int(name.split(".")[2]) for name in tensors if name.startswith("adapter.body.")), default=-1
    )
    channels = [
        len(_tensor(f"adapter.body.{i}.resnets.0.block2.weight", tensors, path)) for i in range(stages)
    ]
    inputs = _tensor("adapter.conv_in.weight", tensors, path).shape[1]
    told = config.get("downscale_factor")
    sides = [told] if isinstance(told, int) else [s for s in _STEMS if inputs in (s**2, 3 * s**2)]
    if len(sides) != 1 or sides[0] < 1 or inputs % sides[0] ** 2:
        raise ValueError(
            "source: expected a stem for squares of 8 or 16 pixels of 1 or 3 channels, or a config whose "
            f"downscale_factor fits it; received {inputs} inputs in '{path}'"
        )
    kind = config.get("adapter_type", _STEMS.get(sides[0], "full_adapter"))
    pools = [int(i > 0 if kind == "full_adapter" else i == 2) for i in range(stages)]
    return {
        "in_channels": inputs // sides[0] ** 2,
        "channels": channels,
        "pools": pools,
        "unshuffle": sides[0],
    }


def _tensor(name: str, tensors: Mapping[str, Tensor], path: Path) -> Tensor:
    if name not in tensors:
        raise ValueError(f"source: expected {name}; received '{path}' without")
    return tensors[name]


def _from_release(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> NexusAdapter:
    """Its config says little of use: `groups` stands over plain convolutions, and the heads in no field."""
    geometry = _geometry(tensors, config, path)
    inner, text_width = _tensor("adapter.body.0.cross_attention.to_k.weight", tensors, path).shape
    grouped = tensors.get("adapter.body.0.resnets.0.block1.gwc.weight")
    heads, head_width = _heads(inner, geometry["channels"])
    arguments = geometry | {
        "groups": 1 if grouped is None else len(grouped) // grouped.shape[1],
        "text_width": text_width,
        "heads": heads,
        "head_width": head_width,
        "residual": False,
        "zero_init": False,
        "noise_exponent": 0.0,
    }
    return _built(arguments, tensors, path)


def _heads(inner: int, channels: list[int]) -> tuple[int, int]:
    """Heads of a given inner width: those of the rule where it gives that width, else by the same widths."""
    heads, head_width = attention_heads(channels)
    if heads * head_width == inner:
        return heads, head_width
    return attention_heads([2 * inner])


def _from_t2i(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
    groups: int,
    options: Mapping[str, Any],
    seed: int,
) -> Imported:
    geometry = _geometry(tensors, config, path)
    is_grey = geometry["in_channels"] == 1
    kind = config.get("adapter_type", _STEMS.get(geometry["unshuffle"], "full_adapter"))
    heads, head_width = attention_heads(geometry["channels"])
    arguments = geometry | dict(options) | {"groups": groups, "heads": heads, "head_width": head_width}
    arguments |= {"text_width": options["text_width"] or _TEXT_WIDTHS[kind]}
    arguments |= {"in_channels": 3} if is_grey else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        adapter: Any = NexusAdapter(**arguments)
    trunk, lost = trunk_tensors(tensors, groups, grey_to=3 if is_grey else None)
    own = {k: v for k, v in adapter.state_dict().items() if ".norm1." in k or ".cross_attention." in k}
    check_tensors(adapter, own | trunk, f"'{path}'")
    adapter.load_state_dict(own | trunk)
    notes = ["norms and attention are new, and have to be trained"]
    if is_grey:
        notes.append("the stem read one channel and reads three, each a third of it: the same on grey maps")
    if groups > 1:
        notes.append(
            "Slim's convolutions are the nearest to the plain ones in least squares: their bias, and "
            f"{lost:.1%} of the kernels' squared norm, have no place in them"
        )
    return Imported(adapter.eval(), "a T2I-Adapter", tuple(notes))


def _built(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> NexusAdapter:
    check_config(arguments)
    given = {name: arguments[name] for name in ARGUMENTS if name in arguments}
    with torch.device("meta"):
        adapter: Any = NexusAdapter(**given)
    check_tensors(adapter, tensors, f"'{path}'")
    # Copies: those of a file stay tied to it.
    adapter.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    built: NexusAdapter = adapter.eval()
    return built
