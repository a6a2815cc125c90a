"""The report of a dry run: parameters, memory, schedule and a summary of the data. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nexus_adapters.bases.base import Base
from nexus_adapters.bases.tokens import find_tokenizer
from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.inspection import Inspection, inspect
from nexus_adapters.data.sample_page import Row, page, read_rows
from nexus_adapters.errors import InvalidArgument, in_utf8
from nexus_adapters.methods import AdapterOptions
from nexus_adapters.training.config import TrainConfig, TrainingOptions
from nexus_adapters.training.optimizer import learning_rate_at
from nexus_adapters.training.recipe_samples import Split, held_out_in_words
from nexus_adapters.training.step_size import estimate_size
from nexus_adapters.training.step_time import describe_time

_GIB = 2**30


def describe(
    config: TrainConfig, base: Base, options: AdapterOptions, split: Split | None, measure: bool = False
) -> str:
    """Return a report of a few lines on the parameters, the schedule, the memory and the time of a run.

    Args:
        config: the recipe.
        base: the base model; its weights are not needed.
        options: the adapter's options.
        split: how the dataset is split; None if it was not opened.
        measure: time a step with random weights, unless the run has a log.

    Raises:
        InvalidArgument: if the size of a batch in bytes overflows.
    """
    training = config.training
    size = estimate_size(config, base, options)
    only = "" if size.trained == size.parameters else f", of which {size.trained:,} are trained"
    lines = [
        f"adapter      {options.method}, {size.parameters:,} parameters{only}",
        f"base         {config.base.path}, {base.denoiser_name} with {size.frozen:,} parameters, "
        f"{_name(size.dtype)}",
        *_schedule(training, None if split is None else split.total),
        *_validation(config.validation.every_steps, split),
        f"memory       about {size.total_bytes / _GIB:.2f} GiB per device during training: "
        f"base {size.base_bytes / _GIB:.2f}, adapter and optimizer {size.adapter_bytes / _GIB:.2f}, "
        f"activations for {training.batch_size} samples {size.activation_bytes / _GIB:.2f}"
        + (", and more while a block is recomputed" if training.gradient_checkpointing else ""),
        describe_time(config, base, options, measure),
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
