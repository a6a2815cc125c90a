"""The checks of a recipe before any model is loaded, the same for training and a dry run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_adapters.adapter.saved import Saved, find_saved
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.loading import open_base
from nexus_adapters.errors import InvalidArgument, expect, renamed
from nexus_adapters.injection.condition import LARGEST
from nexus_adapters.methods import AdapterOptions, find_method, method_for
from nexus_adapters.training.checkpoint import (
    MODULE,
    OPTIMIZER,
    Checkpoint,
    damage,
    latest_checkpoint,
    open_checkpoint,
)
from nexus_adapters.training.config import LossOptions, TrainConfig, ValidationOptions
from nexus_adapters.training.distributed import check_trackers, is_main_process
from nexus_adapters.training.export import check_hub
from nexus_adapters.training.optimizer import check_optimizer
from nexus_adapters.training.precision import choose_precision
from nexus_adapters.training.recipe_samples import samples_cache
from nexus_adapters.training.run_folder import CHECKPOINTS, CONFIG, check_run_folder
from nexus_adapters.training.step_size import training_device

# Arguments of bases and methods -> keys of a recipe.
KEYS = {
    "base": "base.path",
    "base_config": "base.config",
    "base_revision": "base.revision",
    "prediction_type": "base.prediction_type",
    "adapter": "adapter.start_from",  # the only saved adapter that training reads
    "start_from": "adapter.start_from",
    "start_from_optimizer": "adapter.start_from_optimizer",
    "size_ratio": "adapter.size_ratio",
    "noise_exponent": "adapter.noise_exponent",
    "method": "adapter.method",
    "min_snr_gamma": "loss.min_snr_gamma",
    **{
        name: f"adapter.{name}"
        for name in (
            "residual",
            "zero_init",
            "train",
            "groups",
            "heads",
            "head_width",
            "block",
            "block_options",
        )
    },
}


def check_place(config: TrainConfig) -> None:
    """Check that the output folder can be used and, if the adapter is to be uploaded, the Hub.

    Raises:
        InvalidArgument: if one of them cannot be used.
    """
    _check_writable(Path(config.output_dir), "output_dir")
    check_run_folder(config)
    if config.hub.repo_id:
        check_hub(config.hub)


def check_recipe(config: TrainConfig) -> tuple[Base, AdapterOptions, dict[str, Tensor]]:
    """Check all that can be checked without the data and the base's weights. Returns what `check_base` does.

    Raises:
        InvalidArgument: for what is not available on this machine, and for what does not fit the base.
    """
    check_trackers(config.log.trackers)
    choose_precision(config.training.mixed_precision, training_device(config.training))
    if config.cache.enabled or config.data.kind in ("tars", "prepared"):  # their indices are kept there
        _check_writable(samples_cache(config.cache), "cache.folder")
    found = check_base(config)
    if is_main_process():
        _warn_of_large_images(config.data.resolution, found[0].native_size())
    return found


def _warn_of_large_images(resolution: int, native: int) -> None:
    """Warn of images far above the size that the base was trained at; small bases need another default."""
    if resolution > LARGEST * native:
        warnings.warn(
            f"data.resolution: {resolution} pixels are more than {LARGEST:g} times the base's {native}, the "
            f"size that it was trained at; set data.resolution={native}, or prepare the set at this size",
            stacklevel=2,
        )


def _check_writable(folder: Path, name: str) -> None:
    """Raise `InvalidArgument` unless the folder can be written to or created."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # usually a name that is too long
        raise InvalidArgument(
            name, "a folder that can be created", f"'{folder}' ({error.strerror})"
        ) from error
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InvalidArgument(name, "a folder that can be created", f"'{folder}' ('{nearest}' is a file)")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidArgument(name, "a folder that can be written to", f"'{folder}'")


def check_base(config: TrainConfig) -> tuple[Base, AdapterOptions, dict[str, Tensor]]:
    """Return the base, the adapter's options, and the tensors that the adapter starts with.

    The tensors and the architecture in the options are those of the adapter in `adapter.start_from`; without
    one, there are no tensors. A run that resumes has its own architecture and weights, so the adapter it
    started from need not exist anymore. The base's weights are not read.

    Raises:
        InvalidArgument: if the adapter cannot be trained on the base with the recipe's loss and optimizer.
    """
    check_optimizer(config.training)
    with renamed(KEYS):
        base = open_base(config.base.source)
        method = find_method(config.adapter.method)
        own = _own_checkpoint(config)
        start = own or _start(config.adapter, config.data.condition, config.base.path)
        if start is not None and type(saved_as := method_for(start)) is type(method):
            with renamed({"adapter": "start_from"}):
                saved_as.check_saved(start, base)
        options = config.adapter if start is None else method.adopt(config.adapter, start)
        denoiser = base.empty_denoiser()
        with torch.device("meta"):
            adapter = method.build(base, denoiser, options)
        _check_noise(config.loss, options, base)
        _check_sampling(config.validation, base)
        needs_start = own is None
        tensors = dict(method.starting_tensors(adapter, start)) if start is not None and needs_start else {}
        if config.adapter.start_from_optimizer and needs_start:
            _check_optimizer_state(config, adapter)
    return base, options, tensors


def _check_sampling(validation: ValidationOptions, base: Base) -> None:
    """Raise `InvalidArgument` for more sampling steps than the base has timesteps."""
    most = base.num_train_timesteps
    if validation.every_steps and validation.images and validation.num_inference_steps > most:
        raise InvalidArgument(
            "validation.num_inference_steps", f"at most {most}", validation.num_inference_steps
        )


def _check_noise(loss: LossOptions, options: AdapterOptions, base: Base) -> None:
    """Raise `InvalidArgument` if the base's noise schedule does not support a weighting in the recipe."""
    first = torch.zeros(1, dtype=torch.long)
    if gamma := loss.min_snr_gamma:
        base.loss_weights(first, gamma)
    if exponent := getattr(options, "noise_exponent", None):
        base.noise_factors(first, exponent)


def _own_checkpoint(config: TrainConfig) -> Saved | None:
    """The checkpoint that a run with `adapter.start_from` resumes from; None before the first one."""
    folder = Path(config.output_dir)
    if not config.adapter.start_from or not (folder / CONFIG).is_file():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are shown when the run resumes
        found = latest_checkpoint(folder / CHECKPOINTS)
    if found is None or not found.state.get("adapter"):  # the latter in earlier versions
        return None
    return find_saved(found.folder / f"{MODULE}.safetensors")


def _start(options: AdapterOptions, condition_name: str, base: str) -> Saved | None:
    """The adapter that training starts from. `condition_name` and `base` are used to look up its name."""
    if not options.start_from:
        return None
    with renamed({"adapter": "start_from", "condition": "data.condition"}):
        if options.start_from_optimizer:
            weights = starting_checkpoint(options.start_from).folder / f"{MODULE}.safetensors"
            return find_saved(weights, condition_name, base)
        return find_saved(options.start_from, condition_name, base)


def starting_checkpoint(source: str) -> Checkpoint:
    """Return the checkpoint for `adapter.start_from_optimizer`.

    `source` is a checkpoint, or a run whose newest undamaged checkpoint is used.

    Raises:
        InvalidArgument: if there is no undamaged checkpoint.
    """
    folder, found = Path(source), None
    with renamed({"output_dir": "start_from"}):
        if (folder / CONFIG).is_file():
            found = latest_checkpoint(folder / CHECKPOINTS)
        elif damage(folder) is None:
            found = open_checkpoint(folder)
    if found is None or not (found.folder / f"{OPTIMIZER}.safetensors").is_file():
        raise InvalidArgument(
            "start_from_optimizer",
            "a training run or an undamaged checkpoint in adapter.start_from, which contains that state",
            f"'{source}'",
        )
    return found


def _check_optimizer_state(config: TrainConfig, adapter: nn.Module) -> None:
    """Raise `InvalidArgument` unless the optimizer state to start with fits the optimizer and the weights."""
    checkpoint, name = starting_checkpoint(config.adapter.start_from), "start_from_optimizer"
    theirs = checkpoint.state["identity"].get("training.optimizer")
    wanted = config.training.optimizer
    expect(
        theirs == wanted,
        name,
        f"the state of training.optimizer {wanted!r}",
        f"{theirs!r} in '{checkpoint.folder}'",
    )
    ours = {key: tuple(tensor.shape) for key, tensor in adapter.state_dict().items()}
    saved = {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors(MODULE).items()}
    expect(ours == saved, name, "a checkpoint with the same weights", f"others in '{checkpoint.folder}'")
