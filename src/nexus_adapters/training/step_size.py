"""How much memory a training step needs, estimated from shapes alone: nothing is loaded or computed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nexus_adapters.bases.base import Base
from nexus_adapters.data.batch import Batch
from nexus_adapters.errors import InvalidArgument, mentions
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, Method, find_method
from nexus_adapters.methods.cost import parameter_count
from nexus_adapters.methods.method import FEATURES
from nexus_adapters.training.config import TrainConfig, TrainingOptions
from nexus_adapters.training.precision import choose_precision

_OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "adamw8bit": 2}  # per parameter; Muon needs only 4 for matrices


@dataclass(frozen=True)
class StepSize:
    """What a training step keeps in memory on one device.

    Attributes:
        parameters: of the adapter.
        trained: parameters of the adapter that are trained.
        frozen: parameters of the base's denoiser.
        dtype: of the denoiser.
        base_bytes: the denoiser's weights.
        adapter_bytes: the adapter's weights, gradients, optimizer state and moving average.
        activation_bytes: what the forward pass keeps for the backward pass.
    """

    parameters: int
    trained: int
    frozen: int
    dtype: torch.dtype
    base_bytes: int
    adapter_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Without what the allocator and the kernels need on top."""
        return self.base_bytes + self.adapter_bytes + self.activation_bytes


def training_device(training: TrainingOptions) -> torch.device:
    """The device that one process trains on."""
    return torch.device("cuda" if torch.cuda.is_available() and training.device == "auto" else "cpu")


def estimate_size(
    config: TrainConfig, base: Base, options: AdapterOptions, count: int | None = None
) -> StepSize:
    """Estimate the memory of a step by running it on the "meta" device, whose tensors have no storage.

    Args:
        config: the recipe.
        base: the base model; its weights are not needed.
        options: the adapter's options.
        count: samples in a batch; by default the recipe's.

    Raises:
        InvalidArgument: if the size of a batch in bytes overflows.
    """
    training, side = config.training, config.data.resolution
    count = training.batch_size if count is None else count
    method = find_method(options.method)
    dtype = choose_precision(training.mixed_precision, training_device(training)).dtype
    with torch.device("meta"):
        denoiser = nn.Module.to(base.empty_denoiser(), dtype).requires_grad_(False)
        adapter = method.build(base, denoiser, options)
    frozen = parameter_count(denoiser)
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    trained_bytes = 4 + _OPTIMIZER_BYTES[training.optimizer]  # gradients, and the optimizer's state
    if training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        saved = _activation_bytes(count, side, base, denoiser, method, adapter, dtype)
    except RuntimeError as error:
        if not mentions(error, ("overflow",)):  # torch cannot count the bytes of such a tensor
            raise
        raise InvalidArgument(
            "training.batch_size", f"a batch of {side}x{side} pixel images that fits in memory", count
        ) from error
    return StepSize(
        parameters=(parameters := parameter_count(adapter)),
        trained=trained,
        frozen=frozen,
        dtype=dtype,
        base_bytes=frozen * dtype.itemsize,
        adapter_bytes=parameters * 4 * (1 + (training.ema_decay > 0)) + trained * trained_bytes,
        activation_bytes=saved,
    )


def _activation_bytes(
    count: int, side: int, base: Base, denoiser: Any, method: Method, adapter: Any, dtype: torch.dtype
) -> int:
    """Bytes that a step on `count` images of `side` pixels keeps for backward, found on the "meta" device."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # data_ptr is 0 for every tensor on "meta"
        held.append(tensor)  # keep it alive, or its address would be reused
        return tensor

    held: list[Tensor] = []
    places = FeaturePlaces(denoiser, base.places())
    with torch.device("meta"), saved_tensors_hooks(note, lambda tensor: tensor):
        if method.is_fused:  # as autocast does in training
            adapter = deepcopy(adapter).to(dtype)
        network = method.network(adapter, denoiser)
        batch = example_batch(base, count, side, dtype if method.is_fused else torch.float32)
        noisy, t = batch.latents.to(dtype), torch.zeros(count, dtype=torch.long)
        found = method.denoiser_arguments(network, batch, _like_adapter(noisy, method), t, base)
        features = found.pop(FEATURES, None)
        added = {} if features is None else places.arguments([f.to(dtype) for f in features])
        found = {name: _as_dtype(value, dtype) for name, value in found.items()}
        called = network if method.is_fused else denoiser
        others = base.added_arguments({name: _as_dtype(value, dtype) for name, value in batch.added.items()})
        base.predict(called, noisy, t, batch.prompt_embeds.to(dtype), others | found | added)
    weights = {p.untyped_storage()._cdata for module in (denoiser, adapter) for p in module.parameters()}
    return sum(size for key, size in kept.items() if key not in weights)


def _like_adapter(noisy: Tensor, method: Method) -> Tensor:
    """The latents in the dtype the adapter expects where autocast does not convert them."""
    return noisy.float() if method.keeps_float32 and not method.is_fused else noisy


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_as_dtype(part, dtype) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) else value


def example_batch(base: Base, count: int, side: int, dtype: torch.dtype) -> Batch:
    """A batch with the right shapes on the current default device; its values are not set."""
    latents = torch.empty(count, base.latent_channels, *(2 * [side // base.pixels_per_latent]))
    return Batch(
        indices=torch.zeros(count, dtype=torch.long),
        latents=latents,
        noise=torch.empty_like(latents),
        u=torch.zeros(count, dtype=torch.float64),
        condition=torch.empty(count, 3, side, side, dtype=dtype),
        has_condition=torch.ones(count, dtype=torch.bool),
        prompt_embeds=torch.empty(count, base.prompt_tokens, base.text_width, dtype=dtype),
        added=base.example_added(count, dtype),
    )
