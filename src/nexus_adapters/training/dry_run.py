"""The report of a dry run: parameters, memory, schedule and a summary of the data. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nexus_adapters.bases.base import Base
from nexus_adapters.bases.tokens import find_tokenizer
from nexus_adapters.data.batch import Batch
from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.inspection import Inspection, inspect
from nexus_adapters.data.sample_page import Row, page, read_rows
from nexus_adapters.errors import InvalidArgument, in_utf8, mentions
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, Method, find_method
from nexus_adapters.methods.cost import parameter_count
from nexus_adapters.methods.method import FEATURES
from nexus_adapters.training.config import TrainConfig, TrainingOptions
from nexus_adapters.training.optimizer import learning_rate_at
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe_samples import Split, held_out_in_words

_GIB = 2**30
_OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "adamw8bit": 2}  # per parameter; Muon needs only 4 for matrices


def describe(config: TrainConfig, base: Base, options: AdapterOptions, split: Split | None) -> str:
    """Return a report of a few lines on the parameters, the schedule and the memory of a run.

    Args:
        config: the recipe.
        base: the base model; its weights are not needed.
        options: the adapter's options.
        split: how the dataset is split; None if it was not opened.

    Raises:
        InvalidArgument: if the size of a batch in bytes overflows.
    """
    training = config.training
    method = find_method(options.method)
    device = torch.device("cuda" if torch.cuda.is_available() and training.device == "auto" else "cpu")
    precision = choose_precision(training.mixed_precision, device)
    with torch.device("meta"):
        denoiser = nn.Module.to(base.empty_denoiser(), precision.dtype).requires_grad_(False)
        adapter = method.build(base, denoiser, options)
    parameters, frozen = parameter_count(adapter), parameter_count(denoiser)
    held = parameters * (4 + 4 + _OPTIMIZER_BYTES[training.optimizer] + 4 * (training.ema_decay > 0))
    base_bytes = frozen * precision.dtype.itemsize
    if training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    batch = training.batch_size, config.data.resolution
    try:
        saved = _activation_bytes(*batch, base, denoiser, method, adapter, precision.dtype)
    except RuntimeError as error:
        if not mentions(error, ("overflow",)):  # torch cannot count the bytes of such a tensor
            raise
        side = config.data.resolution
        raise InvalidArgument(
            "training.batch_size", f"a batch of {side}x{side} pixel images that fits in memory", batch[0]
        ) from error
    lines = [
        f"adapter      {options.method}, {parameters:,} parameters",
        f"base         {config.base.path}, {base.denoiser_name} with {frozen:,} parameters, "
        f"{_name(precision.dtype)}",
        *_schedule(training, None if split is None else split.total),
        *_validation(config.validation.every_steps, split),
        f"memory       about {(held + base_bytes + saved) / _GIB:.2f} GiB per device during training: "
        f"base {base_bytes / _GIB:.2f}, adapter and optimizer {held / _GIB:.2f}, "
        f"activations for {training.batch_size} samples {saved / _GIB:.2f}",
    ]
    return "\n".join(lines)


def describe_data(config: TrainConfig, samples: ConditionedSource, split: Split) -> list[str]:
    """Return what was found in the dataset, one fact per line.

    Raises:
        InvalidArgument: if so many of the inspected samples are unreadable that training would stop.
    """
    data = config.data
    indices = sorted([*split.trained, *split.held_out, *(bad.index for bad in split.unreadable)])
    tokenizer = find_tokenizer(config.base.source)
    found = inspect(samples.source, indices, samples.load, samples.geometry.target, tokenizer)
    _check_usable(found, data.max_bad_fraction)
    where = data.path or ", ".join(data.shards)
    shape = "about" if data.aspect_buckets else "at"
    lines = [
        f"{len(indices):,} samples{f' in {where!r}' if where else ''} ({data.kind}), {shape} "
        f"{data.resolution}x{data.resolution} pixels",
        *found.describe(),
    ]
    if tokenizer is None:
        lines.append("caption lengths are not reported because the base's tokenizer is not available locally")
    return [f"{'' if place else 'data':<13}{in_utf8(line)}" for place, line in enumerate(lines)]


def preview_of(config: TrainConfig, samples: ConditionedSource, indices: Sequence[int]) -> str:
    """Return an HTML page that shows some of these samples.

    Raises:
        InvalidArgument: if none of them can be read.
    """

    def read(index: int) -> Row:
        sample = samples.fit(index)
        images = {"image": sample.image, config.data.condition: sample.condition}
        return Row(images, sample.captions, sample.key)

    summary = "Each time a training step reads a sample, it uses one of its captions, chosen at random."
    return page("Samples as training reads them", summary, read_rows("data", indices, read))


def _check_usable(found: Inspection, max_bad_fraction: float) -> None:
    """Raise `InvalidArgument` as training would, judged by the inspected samples."""
    if not found.left_out:
        return
    first = found.left_out[0]
    received = (
        f"{len(found.left_out):,} of {found.looked_at:,} inspected, such as {first.key} ({first.reason})"
    )
    if len(found.left_out) == found.looked_at:
        raise InvalidArgument("data", "readable samples", f"only unreadable ones: {received}")
    if len(found.left_out) > max_bad_fraction * found.looked_at:
        expected = f"at most {max_bad_fraction:g} of the samples to be unreadable"
        raise InvalidArgument("data.max_bad_fraction", expected, received)


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
        batch = _example_batch(base, count, side, dtype if method.is_fused else torch.float32)
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


def _example_batch(base: Base, count: int, side: int, dtype: torch.dtype) -> Batch:
    """A batch with the right shapes on the current default device."""
    latents = torch.empty(count, base.latent_channels, *(2 * [side // base.pixels_per_latent]))
    return Batch(
        indices=torch.zeros(count, dtype=torch.long),
        latents=latents,
        noise=latents,
        u=torch.zeros(count, dtype=torch.float64),
        condition=torch.empty(count, 3, side, side, dtype=dtype),
        has_condition=torch.ones(count, dtype=torch.bool),
        prompt_embeds=torch.empty(count, base.prompt_tokens, base.text_width, dtype=dtype),
        added=base.example_added(count, dtype),
    )


def _schedule(training: TrainingOptions, samples: int | None) -> list[str]:
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_train_steps
    read = f"{steps * batch:,} samples per device"
    if samples:
        read += f", {steps * batch / samples:.1f} epochs of {samples:,} samples"
    marks = sorted({0, training.warmup_steps, steps // 2, steps - 1})
    rates = ", ".join(f"{learning_rate_at(training, step):.2e} at {step}" for step in marks)
    parts = f"batch size {training.batch_size} x {training.gradient_accumulation_steps} accumulation steps"
    return [
        f"steps        {steps:,} with {parts}; {read}",
        f"rate         {training.optimizer}, {training.schedule}: {rates}",
    ]


def _validation(every_steps: int, split: Split | None) -> list[str]:
    if not every_steps or split is None:
        return []
    return [f"validation   every {every_steps:,} steps: {held_out_in_words(split)}"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
