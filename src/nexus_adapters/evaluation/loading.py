"""Base and adapters of an evaluation, loaded from what users name them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.adapter import T2IAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from torch import nn

from nexus_adapters import embedded
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.data.encoders import parts_sha256, without_checker
from nexus_adapters.injection.fit import check_fit, check_pixels
from nexus_adapters.training.base import EMBEDDED, BaseShape, base_folder, source
from nexus_adapters.training.config import BaseOptions
from nexus_adapters.training.controlnet_xs import ReshapedControlNetXS

ADAPTER_KINDS: Mapping[str, Any] = {
    "NexusAdapter": NexusAdapter,
    "T2IAdapter": T2IAdapter,
    "ControlNetModel": ControlNetModel,
    "ControlNetXSAdapter": ControlNetXSAdapter,
    "ReshapedControlNetXS": ReshapedControlNetXS,
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What models compute in. ValueError for float16 on a CPU, which lacks half of what is needed."""
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype: expected auto, float32 or bfloat16 on a CPU; received 'float16'")
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return _DTYPES[name]


def load_base(options: BaseOptions, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock pipeline, without its safety checker, which would blacken pictures."""
    if options.path == EMBEDDED:
        pipe: Any = embedded.load_embedded_base(dtype)
    else:
        kind: Any = DiffusionPipeline
        folder, where = base_folder(options), source(options)
        with embedded.no_loading_bars():
            pipe = kind.from_pretrained(folder, torch_dtype=dtype, **without_checker(folder, where), **where)
        embedded.convert(pipe, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_adapter(name: str, adapter: str, condition: str, options: BaseOptions) -> Any:
    """A saved `NexusAdapter`, `T2IAdapter` or `ControlNetModel`, on the CPU in float32.

    Args:
        name: what it is called, for errors.
        adapter: a folder or Hub id; beside the embedded base also one of `embedded.METHODS` of the condition.
        condition: which maps it reads.
        options: of the base.

    Raises:
        ValueError: for what is none of these.
    """
    is_folder = Path(adapter).is_dir()
    if not is_folder and options.path == EMBEDDED and "/" not in adapter:
        return embedded.embedded_adapter(adapter, condition)
    where: dict[str, Any] = {"local_files_only": True} if is_folder else {}
    try:
        kind = NexusAdapter.load_config(adapter, **where).get("_class_name")
        if kind not in ADAPTER_KINDS:
            raise ValueError(f"a {kind}")
        with embedded.no_loading_bars():
            loaded = ADAPTER_KINDS[kind].from_pretrained(adapter, torch_dtype=torch.float32, **where)
    except (OSError, ValueError, json.JSONDecodeError) as error:  # libraries add a page of hints
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"adapter: expected a saved {', '.join(ADAPTER_KINDS)}, for {name}; received '{adapter}' "
            f"({reason})"
        ) from error
    return loaded.eval()


def check_adapter(name: str, adapter: Any, shape: BaseShape) -> None:
    """ValueError unless the adapter fits the base's UNet."""
    unet = shape.empty_unet()
    if isinstance(adapter, NexusAdapter | T2IAdapter):
        try:
            check_fit(adapter, unet)
            check_pixels(adapter, unet, shape.vae_scale_factor)
        except ValueError as error:
            raise ValueError(f"adapter: {name} does not fit the base: {error}") from error
        return
    is_xs = isinstance(adapter, ControlNetXSAdapter)
    first = adapter.conv_in.in_channels if is_xs else adapter.config["in_channels"]
    widths = adapter.config["base_block_out_channels" if is_xs else "block_out_channels"]
    for key, found in (
        ("in_channels", first),
        ("cross_attention_dim", adapter.config["cross_attention_dim"]),
        ("block_out_channels", widths),
    ):
        needed = unet.config[key]
        if _as_tuple(found) != _as_tuple(needed):
            raise ValueError(
                f"adapter: {name} does not fit the base: expected {key} {needed}; received {found}"
            )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def model_sha256(parts: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """SHA-256 over what models compute by: weights and words, and their configs, a scheduler's too.

    Args:
        parts: modules, tokenizers, schedulers.
        config: of what holds them, such as a pipeline.
    """
    configs = {"": _public(config or {})}
    for name, part in parts.items():
        own = getattr(part, "config", {})
        configs[name] = _public(own.to_dict() if hasattr(own, "to_dict") else own)
        configs[name]["class"] = type(part).__name__
    told = json.dumps([parts_sha256(parts), configs], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def source_sha256(name: str) -> str:
    """Of a model that users name: SHA-256 over a folder's or file's content; the name itself for a Hub id."""
    path = Path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256(b"" if path.exists() else name.encode())
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\n".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without where it was loaded from and by which version."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype")
    }


def parameter_count(adapter: nn.Module | None) -> int:
    """How many weights are trained; 0 for no adapter."""
    return 0 if adapter is None else sum(parameter.numel() for parameter in adapter.parameters())
