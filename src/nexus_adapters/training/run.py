"""From a recipe to an adapter: data, cache, base, adapter, loop, and the end of the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nexus_adapters import files
from nexus_adapters.adapter.saved import Saved, find_saved
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import load_denoiser, load_encoders, open_base
from nexus_adapters.data.conditioned import Fitting
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.errors import renamed
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, Method, find_method
from nexus_adapters.training.batches import Material, gather_material, order_samples
from nexus_adapters.training.checkpoint import TrainState
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.cuda_graphs import GraphedDenoiser, has_graphs
from nexus_adapters.training.distributed import (
    check_shared,
    leave_together,
    open_accelerator,
    told_to_trackers,
)
from nexus_adapters.training.dry_run import describe
from nexus_adapters.training.export import IMAGES, check_hub, export, push
from nexus_adapters.training.loop import train
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer, check_optimizer
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe_samples import Split, open_samples
from nexus_adapters.training.run_folder import (
    ADAPTER,
    check_output,
    finished_steps,
    identity,
    write_config,
)
from nexus_adapters.training.validation import Validation
from nexus_adapters.training.validation_images import draw_pictures, held_out_pictures, structure_score

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
    """Train what a recipe says, or resume its run; the folder of the finished adapter.

    Everything is in `config.output_dir`; a finished run there is left as it is. Under `accelerate launch` the
    processes train together.

    Raises:
        InvalidArgument: for a recipe that does not fit the base, the data, or what is in `output_dir`; before
            any model is loaded where possible.
        Stopped: after Ctrl-C or SIGTERM, with the last step saved.
        OSError: where a disk is full or fails.
    """
    check_output(config)
    if config.hub.repo_id:
        check_hub(config.hub)
    output, is_main = Path(config.output_dir), int(os.environ.get("RANK", "0")) == 0
    if (steps := finished_steps(config)) is not None:
        if is_main:
            print(f"'{output}': finished after {steps} steps; nothing is left to do", file=sys.stderr)
    else:
        base, options, start = check_base(config)
        fitting = open_samples(config.data, cache_folder(config), base.size_multiple)
        accelerator = open_accelerator(config)
        choose_precision(config.training.mixed_precision, accelerator.device)
        split, order = order_samples(config, fitting, accelerator.num_processes)
        cache = TensorCache(cache_folder(config)) if config.cache.enabled else None
        with files.locked(output, "output_dir") if accelerator.is_main_process else nullcontext():
            _train(config, base, options, start, fitting, split, order, cache, accelerator)
    if config.hub.repo_id and is_main:
        print(f"pushed to {push(output / ADAPTER, config.hub)}", file=sys.stderr)
    return output / ADAPTER


def dry_run(config: TrainConfig) -> str:
    """Check a recipe as `train_adapter` would, and say what it would do; of the base no weights are read.

    A data set on the Hub, and tars behind URLs, are not opened; the index of local tars is kept.
    """
    check_output(config)
    base, options, _ = check_base(config)
    is_far = config.data.kind == "table" and not Path(config.data.path).exists()
    is_far |= any("://" in shard for shard in config.data.shards)
    if is_far:
        return describe(config, base, options, None)
    fitting = open_samples(config.data, cache_folder(config), base.size_multiple)
    split, _ = order_samples(config, fitting, processes=1)
    return describe(config, base, options, len(split.trained) + len(split.held_out) + len(split.unreadable))


def check_base(config: TrainConfig) -> tuple[Base, AdapterOptions, dict[str, Tensor]]:
    """The base, the adapter's options with the architecture of what it starts from, and that one's tensors.

    The base's weights are not read, but those of `adapter.start_from` are; without it there are no tensors.
    `InvalidArgument` unless the base can train the recipe's adapter, with its loss and optimizer.
    """
    check_optimizer(config.training)
    with renamed(_KEYS):
        base = open_base(config.base.source)
        method = find_method(config.adapter.method)
        start = _start(config)
        options = config.adapter if start is None else method.adopt(config.adapter, start)
        denoiser = base.empty_denoiser()
        with torch.device("meta"):
            adapter = method.build(base, denoiser, options)
        _check_noise(config, options, base)
        tensors = {} if start is None else dict(method.starting_tensors(adapter, start))
    return base, options, tensors


def _check_noise(config: TrainConfig, options: AdapterOptions, base: Base) -> None:
    """`InvalidArgument` where the base's schedule does not have what loss and features are weighed by."""
    first = torch.zeros(1, dtype=torch.long)
    if gamma := config.loss.min_snr_gamma:
        base.loss_weights(first, gamma)
    if exponent := getattr(options, "noise_exponent", None):
        base.noise_factors(first, exponent)


def _start(config: TrainConfig) -> Saved | None:
    """The adapter that training starts from."""
    source = config.adapter.start_from
    if not source:
        return None
    with renamed({"adapter": "start_from", "condition": "data.condition"}):
        return find_saved(source, config.data.condition, config.base.path)


def cache_folder(config: TrainConfig) -> Path:
    """Where encoded samples are kept."""
    if config.cache.folder:
        return Path(config.cache.folder)
    return files.cache_folder() / "training"


def _train(
    config: TrainConfig,
    base: Base,
    options: AdapterOptions,
    start: dict[str, Tensor],
    fitting: Fitting,
    split: Split,
    order: SampleOrder,
    cache: TensorCache | None,
    accelerator: Accelerator,
) -> None:
    training, device = config.training, accelerator.device
    precision = choose_precision(training.mixed_precision, device)
    if accelerator.is_main_process:
        write_config(config)
    with renamed(_KEYS):
        load_encoders(base, config.base.source, device, precision.dtype)
    check_shared("output_dir", Path(config.output_dir), accelerator)
    if cache is not None:
        check_shared("cache.folder", cache.folder, accelerator)
    material = gather_material(config, fitting, split, order, base, cache, accelerator)
    with renamed(_KEYS):
        denoiser = load_denoiser(base, config.base.source, device, precision.dtype)
    method = find_method(options.method)
    adapter = _new_adapter(config, method, options, start, base, denoiser, device)
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
        is_graphed = training.cuda_graphs and has_graphs(device)
        called = GraphedDenoiser(denoiser) if is_graphed else compiled(denoiser)
    instead = _reads_instead(options, material)
    objective = Objective(base, called, places, method, module, precision, config.loss, instead)
    optimizer = build_optimizer(training, adapter)
    state = TrainState.of(adapter, optimizer, training.ema_decay, precision.scales_loss)

    def losses(step: int) -> Iterator[Tensor]:
        return (objective.of(batch) for batch in material.batches(step))

    with told_to_trackers(config, accelerator):
        steps = train(
            state,
            losses,
            training,
            config.checkpoint,
            config.log,
            Path(config.output_dir),
            options.method,
            _identity(config, material, accelerator),
            accelerator,
            wrapped if accelerator.num_processes > 1 else None,
            _validation(config, material, objective, state, denoiser, fitting, accelerator),
        )
    if accelerator.is_main_process:
        export(state.result, method, config, steps, material.report.total)
    leave_together(accelerator)


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def _reads_instead(options: AdapterOptions, material: Material) -> Tensor | None:
    """The empty prompt, where the recipe asks for an adapter that reads nothing else."""
    if getattr(options, "reads_prompt", True):
        return None
    return material.empty["prompt_embeds"][:1].to(material.accelerator.device)


def _new_adapter(
    config: TrainConfig,
    method: Method,
    options: AdapterOptions,
    start: dict[str, Tensor],
    base: Base,
    denoiser: Any,
    device: torch.device,
) -> Any:
    torch.manual_seed(config.seed)
    adapter: Any = method.build(base, denoiser, options)
    if start:
        adapter.load_state_dict(adapter.state_dict() | start)
        start.clear()  # so that training has their memory
    if config.training.channels_last:
        to: Any = nn.Module.to  # diffusers' own warns of a dtype, even where none is given
        to(denoiser, memory_format=torch.channels_last)
        to(adapter, memory_format=torch.channels_last)
    return nn.Module.to(adapter, device).train()


def _validation(
    config: TrainConfig,
    material: Material,
    objective: Objective,
    state: TrainState,
    denoiser: Any,
    fitting: Fitting,
    accelerator: Accelerator,
) -> Validation | None:
    """Of the weights that the run is for: the average, where there is one."""
    options = config.validation
    if not options.every_steps or not material.held_out:
        return None
    method, precision = objective.method, objective.precision
    network = method.network(state.result, denoiser)
    called = network if method.is_fused else denoiser
    measured = replace(objective, denoiser=called, module=network)
    return Validation(
        batches=material.held_out_batches(config.training.batch_size),
        losses=measured.at,
        num_train_timesteps=objective.base.num_train_timesteps,
        draw=lambda pictures: draw_pictures(config, denoiser, method, state.result, precision, pictures),
        score=structure_score(config.data),
        pictures=held_out_pictures(fitting, material.held_out, options),
        folder=Path(config.output_dir) / IMAGES,
        accelerator=accelerator,
        every_steps=options.every_steps,
        patience=options.early_stop_patience,
        last_step=config.training.max_train_steps,
    )


def _identity(config: TrainConfig, material: Material, accelerator: Accelerator) -> dict[str, Any]:
    """What a checkpoint belongs to: the recipe, the samples, and how many of them make a step."""
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    return identity(config) | {"samples": material.content, "global_batch_size": batch}
