"""From a recipe to an adapter: `train_adapter` runs it, `dry_run` checks it and reports what it would do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from nexus_adapters import files
from nexus_adapters.adapter.saved import Saved, find_saved
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import load_denoiser, load_encoders, open_base
from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.errors import renamed
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, Method, find_method
from nexus_adapters.training.batches import Batches, prepare_batches
from nexus_adapters.training.checkpoint import TrainState
from nexus_adapters.training.config import CacheOptions, LossOptions, TrainConfig
from nexus_adapters.training.cuda_graphs import GraphedDenoiser, supports_cuda_graphs
from nexus_adapters.training.distributed import (
    check_shared,
    leave_together,
    open_accelerator,
    open_trackers,
)
from nexus_adapters.training.dry_run import describe
from nexus_adapters.training.export import IMAGES, check_hub, export, push
from nexus_adapters.training.loop import train
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer, check_optimizer
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe_samples import (
    Split,
    open_samples,
    shards_to_keep_together,
    split_samples,
)
from nexus_adapters.training.redaction import without_folders
from nexus_adapters.training.run_folder import (
    ADAPTER,
    check_run_folder,
    finished_steps,
    identity,
    write_config,
)
from nexus_adapters.training.trained_on import record_of
from nexus_adapters.training.validation import Validation
from nexus_adapters.training.validation_images import (
    ValidationInput,
    generate_validation_images,
    structure_score,
    validation_inputs,
)

# Arguments of bases and methods -> keys of a recipe.
_KEYS = {
    "base": "base.path",
    "base_config": "base.config",
    "base_revision": "base.revision",
    "prediction_type": "base.prediction_type",
    "adapter": "adapter.start_from",  # the only saved adapter that a training reads
    "start_from": "adapter.start_from",
    "size_ratio": "adapter.size_ratio",
    "noise_exponent": "adapter.noise_exponent",
    "method": "adapter.method",
    "min_snr_gamma": "loss.min_snr_gamma",
    **{
        name: f"adapter.{name}"
        for name in ("residual", "zero_init", "groups", "heads", "head_width", "block", "block_options")
    },
}


def train_adapter(config: TrainConfig) -> Path:
    """Train an adapter by a recipe, or resume its run. Returns the folder of the finished adapter.

    Everything is in `config.output_dir`; a finished run there is left as it is. Under `accelerate launch` or
    torchrun the processes train together.

    Raises:
        InvalidArgument: for a recipe that does not fit the base, the data, or what is in `output_dir`; before
            any model is loaded where possible.
        Stopped: after Ctrl-C or SIGTERM, with the last step saved.
        OSError: where a disk is full or fails.
    """
    check_run_folder(config)
    if config.hub.repo_id:
        check_hub(config.hub)
    output, is_main = Path(config.output_dir), int(os.environ.get("RANK", "0")) == 0
    if (steps := finished_steps(output, config.training.max_train_steps)) is not None:
        if is_main:
            print(f"'{output}': finished after {steps} steps; nothing is left to do", file=sys.stderr)
    else:
        base, options, start = check_base(config)
        samples = open_samples(config.data, samples_cache(config.cache), base.size_multiple)
        accelerator = open_accelerator(output, config.training.device == "cpu", config.log.trackers)
        choose_precision(config.training.mixed_precision, accelerator.device)
        split, order = _split_and_order(config, samples, accelerator.num_processes)
        cache = TensorCache(samples_cache(config.cache)) if config.cache.enabled else None
        with files.locked(output, "output_dir") if accelerator.is_main_process else nullcontext():
            _train(config, base, options, start, samples, split, order, cache, accelerator)
    if config.hub.repo_id and is_main:
        print(f"pushed to {push(output / ADAPTER, config.hub)}", file=sys.stderr)
    return output / ADAPTER


def dry_run(config: TrainConfig) -> str:
    """Check a recipe as `train_adapter` does, and report what it would do. The base's weights are not read.

    Data sets on the Hub and tars behind URLs are not opened. The index of local tars is kept.
    """
    check_run_folder(config)
    base, options, _ = check_base(config)
    is_far = config.data.kind == "table" and not Path(config.data.path).exists()
    is_far |= any("://" in shard for shard in config.data.shards)
    if is_far:
        return describe(config, base, options, None)
    samples = open_samples(config.data, samples_cache(config.cache), base.size_multiple)
    split, _ = _split_and_order(config, samples, processes=1)
    return describe(config, base, options, len(split.trained) + len(split.held_out) + len(split.unreadable))


def check_base(config: TrainConfig) -> tuple[Base, AdapterOptions, dict[str, Tensor]]:
    """The base, the adapter's options, and the tensors that the adapter starts with.

    The tensors, and the architecture in the options, are those of the adapter in `adapter.start_from`. There
    are no tensors without one. The base's weights are not read.

    `InvalidArgument` unless the adapter can be trained on the base, with the recipe's loss and optimizer.
    """
    check_optimizer(config.training)
    with renamed(_KEYS):
        base = open_base(config.base.source)
        method = find_method(config.adapter.method)
        start = _start(config.adapter.start_from, config.data.condition, config.base.path)
        options = config.adapter if start is None else method.adopt(config.adapter, start)
        denoiser = base.empty_denoiser()
        with torch.device("meta"):
            adapter = method.build(base, denoiser, options)
        _check_noise(config.loss, options, base)
        tensors = {} if start is None else dict(method.starting_tensors(adapter, start))
    return base, options, tensors


def _check_noise(loss: LossOptions, options: AdapterOptions, base: Base) -> None:
    """`InvalidArgument` where the base's noise schedule cannot weight the loss or the features as wanted."""
    first = torch.zeros(1, dtype=torch.long)
    if gamma := loss.min_snr_gamma:
        base.loss_weights(first, gamma)
    if exponent := getattr(options, "noise_exponent", None):
        base.noise_factors(first, exponent)


def _start(source: str, condition_name: str, base: str) -> Saved | None:
    """The adapter that training starts from; the others are where its name is looked up."""
    if not source:
        return None
    with renamed({"adapter": "start_from", "condition": "data.condition"}):
        return find_saved(source, condition_name, base)


def _split_and_order(
    config: TrainConfig, samples: ConditionedSource, processes: int
) -> tuple[Split, SampleOrder]:
    """Which samples are trained on, and in which order.

    `InvalidArgument` for a data set that is empty, or smaller than a batch.
    """
    training = config.training
    held_out = config.validation.samples if config.validation.every_steps else 0
    split = split_samples(samples, config.data, config.seed, held_out)
    together = None if config.cache.enabled else shards_to_keep_together(config.data, samples.source)
    batch_size = training.batch_size * training.gradient_accumulation_steps * processes
    return split, SampleOrder(split.trained, batch_size, config.seed, together)


def samples_cache(options: CacheOptions) -> Path:
    """The folder of encoded samples."""
    return Path(options.folder) if options.folder else files.cache_folder() / "training"


def _train(
    config: TrainConfig,
    base: Base,
    options: AdapterOptions,
    start: dict[str, Tensor],
    samples: ConditionedSource,
    split: Split,
    order: SampleOrder,
    cache: TensorCache | None,
    accelerator: Accelerator,
) -> None:
    training, device, output = config.training, accelerator.device, Path(config.output_dir)
    precision = choose_precision(training.mixed_precision, device)
    if accelerator.is_main_process:
        write_config(config)
    with renamed(_KEYS):
        load_encoders(base, config.base.source, device, precision.dtype)
    check_shared("output_dir", output, accelerator)
    if cache is not None:
        check_shared("cache.folder", cache.folder, accelerator)
    batches = prepare_batches(
        samples=samples,
        split=split,
        order=order,
        base=base,
        cache=cache,
        data=config.data,
        training=training,
        loss=config.loss,
        seed=config.seed,
        skipped_file=output / "skipped.jsonl",
        accelerator=accelerator,
    )
    trained_on: dict[str, Any] = {}
    # Without a cache the samples' contents have not been hashed, and may be too many to read once more.
    if cache is not None and accelerator.is_main_process:
        order, steps = batches.feed.order, training.max_train_steps
        trained_on = record_of(config.data, samples.source, order, split.trained, steps, cache.folder)
    with renamed(_KEYS):
        denoiser = load_denoiser(base, config.base.source, device, precision.dtype)
    method = find_method(options.method)
    adapter = _new_adapter(method, options, start, base, denoiser, config.seed)
    if training.channels_last:
        to: Any = nn.Module.to  # diffusers' own warns about a dtype, even where none is given
        to(denoiser, memory_format=torch.channels_last)
        to(adapter, memory_format=torch.channels_last)
    adapter = nn.Module.to(adapter, device).train()
    network: Any = method.network(adapter, denoiser)
    if training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        if getattr(network, "_supports_gradient_checkpointing", False):
            network.enable_gradient_checkpointing()
    wrapped = accelerator.prepare_model(network)
    compiled: Any = torch.compile if training.compile else _as_it_is
    module = compiled(wrapped)
    places = FeaturePlaces(denoiser, base.places())
    called = module
    if not method.is_fused:
        is_graphed = training.cuda_graphs and supports_cuda_graphs(device)
        called = GraphedDenoiser(denoiser) if is_graphed else compiled(denoiser)
    adapter_prompt = _adapter_prompt(options, batches)
    objective = Objective(base, called, places, method, module, precision, config.loss, adapter_prompt)
    optimizer = build_optimizer(training, adapter)
    state = TrainState.of(adapter, optimizer, training.ema_decay, precision.scales_loss)

    def losses(step: int) -> Iterator[Tensor]:
        return (objective.of(batch) for batch in batches.of_step(step))

    with open_trackers(config.log, identity(without_folders(config)), accelerator):
        steps = train(
            state,
            losses,
            training,
            config.checkpoint,
            config.log,
            output,
            options.method,
            _identity(config, batches, accelerator),
            accelerator,
            wrapped if accelerator.num_processes > 1 else None,
            _validation(config, batches, objective, state, denoiser, samples, accelerator),
        )
    if accelerator.is_main_process:
        export(state.result, method, config, steps, batches.report.total, trained_on)
    leave_together(accelerator)


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def _adapter_prompt(options: AdapterOptions, batches: Batches) -> Tensor | None:
    """The empty prompt, if the recipe asks for an adapter that reads nothing else."""
    if getattr(options, "reads_prompt", True):
        return None
    return batches.empty_prompt["prompt_embeds"][:1].to(batches.accelerator.device)


def _new_adapter(
    method: Method,
    options: AdapterOptions,
    start: dict[str, Tensor],
    base: Base,
    denoiser: Any,
    seed: int,
) -> Any:
    torch.manual_seed(seed)
    adapter: Any = method.build(base, denoiser, options)
    if start:
        adapter.load_state_dict(adapter.state_dict() | start)
        start.clear()  # to free their memory
    return adapter


def _validation(
    config: TrainConfig,
    batches: Batches,
    objective: Objective,
    state: TrainState,
    denoiser: Any,
    samples: ConditionedSource,
    accelerator: Accelerator,
) -> Validation | None:
    """Validation of the weights that the run results in: the average, if there is one."""
    options = config.validation
    if not options.every_steps or not batches.held_out:
        return None
    method, precision = objective.method, objective.precision
    network = method.network(state.result, denoiser)
    called = network if method.is_fused else denoiser
    measured = replace(objective, denoiser=called, module=network)

    def generate(inputs: Sequence[ValidationInput]) -> list[Image.Image]:
        return generate_validation_images(
            denoiser, config.base.source, method, state.result, precision, inputs, options, config.seed
        )

    return Validation(
        batches=batches.of_validation(config.training.batch_size),
        losses=measured.at,
        num_train_timesteps=objective.base.num_train_timesteps,
        inputs=validation_inputs(samples, batches.held_out, options),
        generate=generate,
        score=structure_score(config.data),
        folder=Path(config.output_dir) / IMAGES,
        accelerator=accelerator,
        every_steps=options.every_steps,
        patience=options.early_stop_patience,
        last_step=config.training.max_train_steps,
    )


def _identity(config: TrainConfig, batches: Batches, accelerator: Accelerator) -> dict[str, Any]:
    """What a checkpoint belongs to: the recipe, the samples, and the number of samples in a step."""
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    return identity(config) | {"samples": batches.content_hash, "global_batch_size": batch}
