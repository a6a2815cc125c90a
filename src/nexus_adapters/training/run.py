"""From a recipe to an adapter: data, cache, base, adapter, loop, and the end of the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.adapter import T2IAdapter
from torch import Tensor, nn

from nexus_adapters.data.cache import TensorCache
from nexus_adapters.data.encoders import load_encoders
from nexus_adapters.data.fitting import Fitting
from nexus_adapters.data.order import SampleOrder
from nexus_adapters.data.user_cache import user_cache
from nexus_adapters.training.base import (
    BaseShape,
    base_folder,
    base_shape,
    check_weights,
    load_unet,
    noise_schedule,
    source,
)
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.dry_run import describe
from nexus_adapters.training.export import IMAGES, check_hub, export, push
from nexus_adapters.training.graphs import GraphedUNet, has_graphs
from nexus_adapters.training.loop import train
from nexus_adapters.training.material import Material, gather_material, order_samples
from nexus_adapters.training.methods import (
    FeatureMethod,
    Method,
    adapter_of,
    called_unet,
    method_of,
    trained_module,
)
from nexus_adapters.training.objective import Objective
from nexus_adapters.training.optimizer import build_optimizer, check_optimizer
from nexus_adapters.training.output import (
    ADAPTER,
    check_output,
    finished_steps,
    identity,
    occupied,
    write_config,
)
from nexus_adapters.training.pictures import draw_pictures, held_out_pictures, structure_score
from nexus_adapters.training.precision import Precision, choose_precision
from nexus_adapters.training.processes import (
    check_shared,
    leave_together,
    open_accelerator,
    told_to_trackers,
)
from nexus_adapters.training.samples import Split
from nexus_adapters.training.sources import open_samples
from nexus_adapters.training.state import TrainState
from nexus_adapters.training.validation import Validation
from nexus_adapters.training.warm_start import starting_tensors


def train_adapter(config: TrainConfig) -> Path:
    """Train, or go on training, what a recipe says; the folder of the finished adapter.

    Everything is in `config.output_dir`; a finished run there is left as it is. Under `accelerate launch` the
    processes train together.

    Raises:
        ValueError: for a recipe that does not fit the base, the data, or what is in `output_dir`; before any
            model is loaded where that can be told.
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
        shape = check_base(config)
        fitting = open_samples(config.data, cache_folder(config), shape.multiple)
        accelerator = open_accelerator(config)
        choose_precision(config.training.mixed_precision, accelerator.device)
        check_weights(config.base)
        split, order = order_samples(config, fitting, accelerator.num_processes)
        cache = TensorCache(cache_folder(config)) if config.cache.enabled else None
        with occupied(output) if accelerator.is_main_process else nullcontext():
            _train(config, shape, fitting, split, order, cache, accelerator)
    if config.hub.repo_id and is_main:
        print(f"pushed to {push(output / ADAPTER, config.hub)}", file=sys.stderr)
    return output / ADAPTER


def dry_run(config: TrainConfig) -> str:
    """Check a recipe as `train_adapter` would, and say what it would do; no model of the base is loaded.

    A data set on the Hub, and tars behind URLs, are not opened; the index of local tars is kept.
    """
    check_output(config)
    shape = check_base(config)
    is_far = config.data.kind == "table" and not Path(config.data.path).exists()
    is_far |= any("://" in shard for shard in config.data.shards)
    if is_far:
        return describe(config, shape, None)
    fitting = open_samples(config.data, cache_folder(config), shape.multiple)
    split, _ = order_samples(config, fitting, processes=1)
    return describe(config, shape, len(split.trained) + len(split.held_out) + len(split.unreadable))


def check_base(config: TrainConfig) -> BaseShape:
    """ValueError unless the recipe's adapter and optimizer can be built for its base; no weights are read."""
    check_optimizer(config.training)
    shape = base_shape(config.base)
    with torch.device("meta"):
        adapter = adapter_of(config.adapter, shape.empty_unet(), shape.vae_scale_factor)
    if config.adapter.start_from:
        starting_tensors(adapter, config.adapter.start_from)
    return shape


def cache_folder(config: TrainConfig) -> Path:
    """Where encoded samples are kept."""
    if config.cache.folder:
        return Path(config.cache.folder)
    return user_cache() / "training"


def _train(
    config: TrainConfig,
    shape: BaseShape,
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
    encoders = load_encoders(base_folder(config.base), source(config.base), device, precision.dtype)
    scheduler = noise_schedule(encoders.pipe.scheduler)
    check_shared("output_dir", Path(config.output_dir), accelerator)
    if cache is not None:
        check_shared("cache.folder", cache.folder, accelerator)
    material = gather_material(config, fitting, split, order, encoders, cache, accelerator)
    unet = load_unet(config.base, device, precision.dtype)
    adapter = _new_adapter(config, unet, shape, device)
    trained: Any = trained_module(adapter, unet)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if not isinstance(trained, T2IAdapter):
            trained.enable_gradient_checkpointing()
    wrapped = accelerator.prepare_model(trained)
    compiled: Any = torch.compile if training.compile else _as_it_is
    method = _blinded(config, method_of(adapter, compiled(wrapped), scheduler), material)
    called = called_unet(method, unet)
    if called is unet:
        is_graphed = training.cuda_graphs and has_graphs(device)
        called = GraphedUNet(unet) if is_graphed else compiled(unet)
    objective = Objective(called, scheduler, method, precision, config.loss)
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
            config.adapter.method,
            _identity(config, material, accelerator),
            accelerator,
            wrapped if accelerator.num_processes > 1 else None,
            _validation(config, material, objective, state, unet, fitting, precision, accelerator),
        )
    if accelerator.is_main_process:
        export(state.result, config, steps, material.report.total)
    leave_together(accelerator)


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def _blinded(config: TrainConfig, method: Method, material: Material) -> Method:
    """The method, reading the empty prompt alone where the recipe says so."""
    if isinstance(method, FeatureMethod) and not config.adapter.reads_prompt:
        empty = material.empty["prompt_embeds"][:1]
        method.reads_instead = empty.to(material.accelerator.device)
    return method


def _new_adapter(config: TrainConfig, unet: Any, shape: BaseShape, device: torch.device) -> Any:
    options, training = config.adapter, config.training
    torch.manual_seed(config.seed)
    adapter = adapter_of(options, unet, shape.vae_scale_factor)
    if options.start_from:
        start = starting_tensors(adapter, options.start_from)
        adapter.load_state_dict(adapter.state_dict() | start)
    if training.channels_last:
        to: Any = nn.Module.to  # diffusers' own warns of a dtype, even where none is given
        to(unet, memory_format=torch.channels_last)
        to(adapter, memory_format=torch.channels_last)
    return nn.Module.to(adapter, device).train()


def _validation(
    config: TrainConfig,
    material: Material,
    objective: Objective,
    state: TrainState,
    unet: Any,
    fitting: Fitting,
    precision: Precision,
    accelerator: Accelerator,
) -> Validation | None:
    """Of the weights that the run is for: the average, where there is one."""
    options = config.validation
    if not options.every_steps or not material.held_out:
        return None
    module, scheduler = trained_module(state.result, unet), objective.scheduler
    method = method_of(state.result, module, scheduler)
    method = _blinded(config, method, material)
    measured = Objective(called_unet(method, unet), scheduler, method, precision, config.loss)
    return Validation(
        batches=material.held_out_batches(config.training.batch_size),
        losses=measured.at,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        draw=lambda pictures: draw_pictures(config, unet, state.result, precision, pictures),
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
