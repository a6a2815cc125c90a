"""`train_adapter` trains an adapter by a recipe; `dry_run` checks the recipe and reports what it would do."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
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
from nexus_adapters.bases.base import Base, parts_sha256
from nexus_adapters.bases.loading import load_denoiser, load_encoders
from nexus_adapters.data.conditioned import ConditionedSource
from nexus_adapters.data.feed import SampleOrder
from nexus_adapters.data.sample_page import ROWS
from nexus_adapters.data.tensor_cache import TensorCache
from nexus_adapters.errors import expect, renamed
from nexus_adapters.injection.places import FeaturePlaces
from nexus_adapters.methods import AdapterOptions, Method, find_method
from nexus_adapters.training.batches import Batches, prepare_batches
from nexus_adapters.training.checkpoint import (
    AVERAGE,
    MODULE,
    TrainState,
    checkpoint_folder,
    checkpoint_folders,
    damage,
    open_checkpoint,
)
from nexus_adapters.training.checks import KEYS, check_place, check_recipe, starting_checkpoint
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.cuda_graphs import GraphedDenoiser, supports_cuda_graphs
from nexus_adapters.training.data_identity import (
    DataIdentity,
    TrainedOn,
    check_data,
    record_data,
    record_trained,
    trained_on,
)
from nexus_adapters.training.distributed import (
    check_shared,
    is_main_process,
    leave_together,
    open_accelerator,
    open_trackers,
)
from nexus_adapters.training.dry_run import describe, describe_data, preview_of
from nexus_adapters.training.export import IMAGES, export, push, warn_of_finished
from nexus_adapters.training.loop import train
from nexus_adapters.training.loss import Objective
from nexus_adapters.training.optimizer import build_optimizer
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe_samples import (
    Split,
    check_samples,
    held_out_in_words,
    open_samples,
    option_keys,
    samples_cache,
    shards_to_keep_together,
    split_samples,
    warn_of_many_epochs,
)
from nexus_adapters.training.redaction import without_folders
from nexus_adapters.training.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    finished_steps,
    with_absolute_paths,
    write_config,
)
from nexus_adapters.training.run_identity import HELD_OUT, identity
from nexus_adapters.training.validation import Validation
from nexus_adapters.training.validation_images import (
    ValidationInput,
    generate_validation_images,
    structure_score,
    validation_inputs,
)


def train_adapter(config: TrainConfig) -> Path:
    """Train an adapter by a recipe, or resume an interrupted run. Returns the folder of the finished adapter.

    All files are written to `config.output_dir`. A finished run there is not changed. Processes started by
    `accelerate launch` or torchrun train together.

    Raises:
        InvalidArgument: if the recipe does not fit the base, the data, or an existing run in `output_dir`. If
            possible, this is detected before any model is loaded.
        Stopped: after Ctrl-C or SIGTERM, with the last step saved.
        OSError: if a disk is full or fails.
    """
    check_place(config)
    output, is_main = Path(config.output_dir), is_main_process()
    if (steps := finished_steps(output, config.training.max_train_steps)) is not None:
        if is_main:
            print(f"'{output}': already finished after {steps} steps; nothing to do", file=sys.stderr)
            warn_of_finished(output)
    else:
        base, options, start = check_recipe(config)
        samples = open_samples(config.data, samples_cache(config.cache), base.size_multiple)
        accelerator = open_accelerator(output, config.training.device == "cpu", config.log.trackers)
        processes = accelerator.num_processes
        split, order = _split_and_order(config, samples, processes)
        data = check_data(config, samples.source, split.total, accelerator.process_index, processes)
        cache = TensorCache(samples_cache(config.cache)) if config.cache.enabled else None
        with files.locked(output, "output_dir") if accelerator.is_main_process else nullcontext():
            _train(config, base, options, start, samples, split, order, data, cache, accelerator)
    if config.hub.repo_id and is_main:
        print(f"uploaded to {push(output / ADAPTER, config.hub)}", file=sys.stderr)
    return output / ADAPTER


def dry_run(config: TrainConfig, preview: Path | None = None, measure: bool = False) -> str:
    """Check a recipe as `train_adapter` does and return a report of what it would do.

    The base's weights are not read. Datasets on the Hub and tars at URLs are opened only for a preview. The
    index of local tars is stored for later.

    Args:
        config: the recipe.
        preview: an HTML file to write that shows samples as training reads them; None for none.
        measure: time a step on this machine, with random weights, to estimate how long the run takes. This
            takes seconds on a GPU, and can take minutes on a CPU. A run that has a log is not measured.

    Raises:
        InvalidArgument: as `train_adapter`.
    """
    check_place(config)
    base, options, _ = check_recipe(config)
    is_local = config.data.is_local
    if not is_local and preview is None:
        check_samples(config.data, base.size_multiple)
        return describe(config, base, options, None, measure)
    samples = open_samples(config.data, samples_cache(config.cache), base.size_multiple)
    split, _ = _split_and_order(config, samples, processes=1)
    if checkpoint_folders(Path(config.output_dir) / CHECKPOINTS):
        check_data(config, samples.source, split.total)
    report = describe(config, base, options, split, measure)
    if preview is not None:
        indices = sorted([*split.trained, *split.held_out])
        files.write_text(preview, preview_of(config, samples, indices if is_local else indices[:ROWS]))
    return "\n".join([report, *describe_data(config, samples, split)]) if is_local else report


def _split_and_order(
    config: TrainConfig, samples: ConditionedSource, processes: int
) -> tuple[Split, SampleOrder]:
    """The samples that are trained on, and their order.

    Raises `InvalidArgument` for a dataset that is empty or smaller than a batch.
    """
    training, validation = config.training, config.validation
    batch_size = training.batch_size * training.gradient_accumulation_steps * processes
    held_out = validation.samples if validation.every_steps else 0
    split = split_samples(samples, config.data, config.seed, held_out, batch_size)
    together = None if config.cache.enabled else shards_to_keep_together(config.data, samples.source)
    order = SampleOrder(split.trained, batch_size, config.seed, together)
    if validation.every_steps and not split.held_out:
        what = f"only {len(split.trained)} samples for batches of {batch_size}, so none can be held out"
        key = "early_stop_patience" if validation.early_stop_patience else "select"
        can_go_without = not (validation.early_stop_patience or validation.select == "best")
        expect(can_go_without, f"validation.{key}", "a dataset large enough to validate", what)
        if is_main_process():
            warnings.warn(
                f"validation: turned off, because the dataset has {what}. Set validation.every_steps = 0 to "
                "silence this warning",
                stacklevel=2,
            )
    warn_of_many_epochs(training, batch_size, len(split.trained))
    return split, order


def _train(
    config: TrainConfig,
    base: Base,
    options: AdapterOptions,
    start: dict[str, Tensor],
    samples: ConditionedSource,
    split: Split,
    order: SampleOrder,
    data: DataIdentity,
    cache: TensorCache | None,
    accelerator: Accelerator,
) -> None:
    training, device, output = config.training, accelerator.device, Path(config.output_dir)
    precision = choose_precision(training.mixed_precision, device)
    accelerator.wait_for_everyone()  # before the record changes
    if accelerator.is_main_process:
        write_config(config)
        if not checkpoint_folders(output / CHECKPOINTS):
            record_data(output, data)
    with renamed(KEYS):
        load_encoders(base, config.base.source, device, precision.dtype)
    check_shared("output_dir", output, accelerator)
    if cache is not None:
        check_shared("cache.folder", cache.folder, accelerator)
    if split.held_out and accelerator.is_main_process:
        print(f"validation: {held_out_in_words(split)}", file=sys.stderr)
    with renamed(option_keys(config.data)):
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
    known = TrainedOn()
    if accelerator.is_main_process:
        known = trained_on(config, samples.source, batches.feed.order, split.trained)
        record_trained(output, known)
    with renamed(KEYS):
        denoiser = load_denoiser(base, config.base.source, device, precision.dtype)
    denoiser_hash = _denoiser_hash(base, denoiser)
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
    if options.start_from_optimizer and not checkpoint_folders(output / CHECKPOINTS):
        first = starting_checkpoint(options.start_from)
        state.restore_optimizer(first, first.state["train"])

    def losses(step: int) -> Iterator[Tensor]:
        return (objective.of(batch) for batch in batches.of_step(step))

    validation = _validation(config, split, batches, objective, state, denoiser, samples, accelerator)
    with open_trackers(config.log, identity(without_folders(config)), accelerator):
        steps = train(
            state,
            losses,
            training,
            config.checkpoint,
            config.log,
            output,
            options.method,
            _identity(config, data, split, batches.encoders_hash, denoiser_hash, accelerator),
            accelerator,
            wrapped if accelerator.num_processes > 1 else None,
            validation,
        )
    if accelerator.is_main_process:
        best_step = None if validation is None else validation.best_step
        weights_step = _take_best(state, best_step, steps, output)
        export(state.result, method, config, options, steps, weights_step, batches.report.total, known)
    leave_together(accelerator)


def _take_best(state: TrainState, best_step: int | None, steps: int, output: Path) -> int:
    """Load the weights with the best validation score if they are to be exported. Returns their step."""
    if best_step is None or best_step == steps:
        return steps
    folder = checkpoint_folder(output / CHECKPOINTS, best_step)
    if (reason := damage(folder)) is not None:
        warnings.warn(
            f"validation: the last weights are exported instead of the best, '{folder}', because {reason}",
            stacklevel=2,
        )
        return steps
    state.result.load_state_dict(
        open_checkpoint(folder).tensors(MODULE if state.average is None else AVERAGE)
    )
    return best_step


def _as_it_is(module: nn.Module) -> nn.Module:
    return module


def _adapter_prompt(options: AdapterOptions, batches: Batches) -> Tensor | None:
    """The empty prompt, for an adapter that is not to read the prompts."""
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
    split: Split,
    batches: Batches,
    objective: Objective,
    state: TrainState,
    denoiser: Any,
    samples: ConditionedSource,
    accelerator: Accelerator,
) -> Validation | None:
    """The validation of the weights to export: the average if there is one."""
    options = config.validation
    if not options.every_steps or not batches.held_out:
        if options.every_steps and split.held_out and accelerator.is_main_process:
            warnings.warn(
                f"validation: turned off, because all {len(split.held_out)} held-out samples are unreadable",
                stacklevel=2,
            )
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
        selects_best=options.selects_best,
        is_healthy=lambda: state.bad_steps == 0,
    )


def _denoiser_hash(base: Base, denoiser: nn.Module) -> str:
    """A hash of the denoiser's weights and of the noise schedule used in training."""
    schedule = {key: value for key, value in base.schedule.config.items() if not key.startswith("_")}
    made_of = [parts_sha256({base.denoiser_name: denoiser}), schedule]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _identity(
    config: TrainConfig,
    data: DataIdentity,
    split: Split,
    encoders_hash: str,
    denoiser_hash: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that a checkpoint depends on: the recipe, the data, the base, and the samples per step."""
    training = config.training
    batch = training.batch_size * training.gradient_accumulation_steps * accelerator.num_processes
    contents: dict[str, Any] = {"data": data.digest, "encoders": encoders_hash, "denoiser": denoiser_hash}
    if not split.is_as_before(config.validation.samples if config.validation.every_steps else 0):
        contents[HELD_OUT] = len(split.held_out)
    return identity(with_absolute_paths(config)) | contents | {"global_batch_size": batch}
