"""The files of an adapter that others have saved: which they are, and the tensors in them. No code is run."""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_adapters.adapter.file_names import WEIGHTS
from nexus_adapters.adapter.stored import check_hash, read_header
from nexus_adapters.adapter.trunk import name_as_diffusers

CONFIG = "config.json"
CONFIG_KEY = "nexus_adapters.config"  # of a single file's metadata
_PICKLE = b"\x80"  # the first byte of pickles since protocol 2

# What a file seems to be by the beginning of any of its names, most telling first.
_SIGNS = {
    "model.diffusion_model.": "a whole Stable Diffusion checkpoint",
    "controlnet_cond_embedding.": "a ControlNet",
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "lora_unet_": "a LoRA",
    "lora_te": "a LoRA",
    "unet.down_blocks.": "a LoRA",
    "ip_adapter.": "an IP-Adapter",
    "image_proj": "an IP-Adapter",
    "down_blocks.": "a UNet",
    "text_model.": "a text encoder",
    "encoder.down": "a VAE",
    "first_stage_model.": "a VAE",
    "string_to_param": "a textual inversion",
    "emb_params": "a textual inversion",
}


def find_files(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The config that comes with the weights, empty where none does, and the files of the weights."""
    if path.is_dir():
        if (path / "model_index.json").is_file():
            raise ValueError(
                f"source: expected an adapter; received '{path}', a pipeline: give its adapter's folder"
            )
        config = _read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
        kind = config.get("_class_name", "NexusAdapter")
        if kind not in ("NexusAdapter", "T2IAdapter"):
            raise ValueError(f"source: expected an adapter; received '{path}', whose config is a {kind}'s")
        return config, _weights_in(path)
    kept = read_header(path, "source").metadata.get(CONFIG_KEY) if path.suffix == ".safetensors" else None
    return json.loads(kept) if kept is not None else {}, [path]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"source: expected JSON; received '{file}' ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"source: expected a JSON object; received '{file}', a {type(content).__name__}")
    return content


def _weights_in(folder: Path) -> list[Path]:
    """One save's: the plain one first, else any."""
    plain = [folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"]
    indices = sorted(folder.glob(f"{WEIGHTS}.safetensors.index.*json"))
    others = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    whole = [file for file in others if "-of-" not in file.name]
    for file in (*plain, *whole, *indices):
        if file.is_file() and file.suffix == ".json":
            names = set(map(str, _read_json(file).get("weight_map", {}).values()))
            return [folder / Path(name).name for name in sorted(names)]
        if file.is_file():
            return [file]
    raise ValueError(f"source: expected weights; received '{folder}' without any")


def read_tensors(files: Sequence[Path], path: Path) -> dict[str, Tensor]:
    """All tensors of the files, in the names of diffusers."""
    tensors: dict[str, Tensor] = {}
    if all(file.suffix == ".safetensors" for file in files):
        check_hash(files, "source")
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    if any(name.startswith("adapter.conv_in.") for name in tensors):
        return tensors
    starts = {name.split(".")[0] for name in tensors}
    if {"conv_in", "body"} <= starts:
        return name_as_diffusers(tensors)
    raise ValueError(f"source: expected an adapter; received '{path}', which seems to be {_seems(tensors)}")


def _unpickled(file: Path) -> dict[str, Tensor]:
    if not _may_be_pickled(file):
        raise ValueError(f"source: expected tensors; received '{file}', which holds none")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"source: expected pickled tensors and nothing else; received '{file}', whose pickle would run "
            "code. It was not run"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"source: expected tensors; received '{file}', which cannot be read ({reason})"
        ) from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"source: expected tensors by name; received '{file}', a {type(content).__name__}")
    return dict(content)


def _may_be_pickled(file: Path) -> bool:
    """Whether it begins as what `torch.save` writes does, now or in its first years."""
    with file.open("rb") as stream:
        return stream.read(1) == _PICKLE or zipfile.is_zipfile(file)


def _seems(tensors: Mapping[str, Tensor]) -> str:
    for sign, what in _SIGNS.items():
        if any(name.startswith(sign) for name in tensors):
            return what
    if any(".lora" in name or "lora_" in name for name in tensors):
        return "a LoRA"
    if any(".out_conv." in name for name in tensors):
        return "a light T2I-Adapter, whose trunk is another"
    shown = ", ".join(sorted(tensors)[:3]) or "empty"
    return f"something else ({shown})"
