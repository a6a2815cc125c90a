"""What a recipe would do, from configs alone: parameters, memory, schedule. Nothing is trained or written."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nexus_adapters.adapter.geometry import text_width
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.injection.residuals import residuals
from nexus_adapters.training.base import BaseShape
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.methods import adapter_of, trained_module
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.schedule import learning_rate_at

_GIB = 2**30
_OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "adamw8bit": 2}  # a parameter; Muon's matrices take 4


def describe(config: TrainConfig, shape: BaseShape, samples: int | None) -> str:
    """A report of a few lines. `samples`: in the data set; None where it was not opened."""
    options, training = config.adapter, config.training
    device = torch.device("cuda" if torch.cuda.is_available() and training.device == "auto" else "cpu")
    precision = choose_precision(training.mixed_precision, device)
    with torch.device("meta"):
        unet = nn.Module.to(shape.empty_unet(), precision.dtype).requires_grad_(False)
        adapter = adapter_of(options, unet, shape.vae_scale_factor)
    parameters = _count(adapter)
    held = parameters * (4 + 4 + _OPTIMIZER_BYTES[training.optimizer] + 4 * (training.ema_decay > 0))
    base = _count(unet) * precision.dtype.itemsize
    saved = activation_bytes(config, shape, unet, adapter, precision.dtype)
    lines = [
        f"adapter      {options.method}, {parameters:,} parameters",
        f"base         {config.base.path}, UNet of {_count(unet):,} parameters, {_name(precision.dtype)}",
        *_schedule(config, samples),
        f"memory       about {(held + base + saved) / _GIB:.2f} GiB a device in training: "
        f"base {base / _GIB:.2f}, adapter and optimizer {held / _GIB:.2f}, "
        f"activations of {training.batch_size} samples {saved / _GIB:.2f}",
    ]
    return "\n".join(lines)


def activation_bytes(
    config: TrainConfig, shape: BaseShape, unet: Any, adapter: Any, dtype: torch.dtype
) -> int:
    """What a step keeps for its backward pass, found by running one without data or memory."""
    count, side = config.training.batch_size, config.data.resolution
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # data_ptr is 0 for all on "meta"
        held.append(tensor)  # or addresses would be used again
        return tensor

    held: list[Tensor] = []
    if config.training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    with torch.device("meta"), saved_tensors_hooks(note, lambda tensor: tensor):
        latents = torch.empty(
            count, shape.latent_channels, *(2 * [side // shape.vae_scale_factor]), dtype=dtype
        )
        text = torch.empty(count, 77, text_width(shape.unet), dtype=dtype)
        condition = torch.empty(count, 3, side, side)
        added = added_arguments(shape, count, dtype)
        called = unet
        if isinstance(adapter, ControlNetXSAdapter):  # what autocast does in training
            adapter = deepcopy(adapter).to(dtype)
            called = trained_module(adapter, unet)
        controls = _controls(adapter, latents, text, condition, added)
        called(latents, torch.zeros(count), encoder_hidden_states=text, **added, **controls)
    weights = {p.untyped_storage()._cdata for module in (unet, adapter) for p in module.parameters()}
    return sum(size for key, size in kept.items() if key not in weights)


def _controls(
    adapter: Any, latents: Tensor, text: Tensor, condition: Tensor, added: dict[str, Any]
) -> dict[str, Any]:
    """What an adapter gives the UNet."""
    if isinstance(adapter, ControlNetXSAdapter):
        return {"controlnet_cond": condition.to(latents.dtype)}
    if isinstance(adapter, ControlNetModel):
        down, middle = adapter(
            latents.float(), torch.zeros(len(latents)), text.float(), condition, return_dict=False, **added
        )
        down = [part.to(latents.dtype) for part in down]
        middle = middle.to(latents.dtype)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    reads_text = isinstance(adapter, NexusAdapter)
    features = adapter(condition, text.float()) if reads_text else adapter(condition)
    return residuals(features, like=latents)


def _schedule(config: TrainConfig, samples: int | None) -> list[str]:
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_train_steps
    read = f"{steps * batch:,} samples read on each device"
    if samples:
        read += f", of {samples:,}: {steps * batch / samples:.1f} epochs"
    marks = sorted({0, training.warmup_steps, steps // 2, steps - 1})
    rates = ", ".join(f"{learning_rate_at(training, step):.2e} at {step}" for step in marks)
    parts = f"{training.batch_size} samples x {training.gradient_accumulation_steps} parts"
    return [
        f"steps        {steps:,} of {parts}; {read}",
        f"rate         {training.optimizer}, {training.schedule}: {rates}",
    ]


def added_arguments(shape: BaseShape, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """What SDXL's UNet is told beside the text."""
    if shape.unet.get("addition_embed_type") != "text_time":
        return {}
    width = shape.unet["projection_class_embeddings_input_dim"] - 6 * shape.unet["addition_time_embed_dim"]
    embeds = torch.empty(count, width, dtype=dtype)
    return {"added_cond_kwargs": {"text_embeds": embeds, "time_ids": torch.empty(count, 6, dtype=dtype)}}


def _count(module: nn.Module | Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
