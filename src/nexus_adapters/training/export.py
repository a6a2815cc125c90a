"""The result of a run: a folder for `from_pretrained` with a model card, and its upload to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily
from safetensors import SafetensorError
from torch import nn

from nexus_adapters import __version__
from nexus_adapters.bundled import EMBEDDED
from nexus_adapters.errors import InvalidArgument, one_line
from nexus_adapters.files import read_json_lines, remove_unfinished, replacing_folder
from nexus_adapters.methods import AdapterOptions, Method
from nexus_adapters.training.config import HubOptions, TrainConfig
from nexus_adapters.training.data_identity import TrainedOn
from nexus_adapters.training.recipe import dump_config
from nexus_adapters.training.redaction import without_folders
from nexus_adapters.training.run_folder import ADAPTER, FINISHED, LOG
from nexus_adapters.training.run_identity import identity

IMAGES = "images"  # in the run's folder: sheets of validation images
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


def export(
    adapter: Any,
    method: Method,
    config: TrainConfig,
    options: AdapterOptions,
    steps: int,
    weights_step: int,
    samples: int,
    trained_on: TrainedOn,
) -> Path:
    """Write `output_dir/adapter` atomically: float32 weights, README.md, loss curves and sample images.

    Args:
        adapter: the adapter with the weights to export.
        method: the adapter's method.
        config: the recipe.
        options: the recipe's `[adapter]` with what was taken over from `start_from`.
        steps: the run's last step.
        weights_step: the step of the weights; less than `steps` if an earlier validation was better.
        samples: number of samples in the dataset.
        trained_on: the samples the adapter was trained on, which are recorded with it.

    Returns:
        The folder.

    Raises:
        OSError: if the disk is full or fails.
    """
    output = Path(config.output_dir)
    rows = read_json_lines(output / LOG, dict)
    record = {
        "steps": steps,
        "weights_of_step": weights_step,
        "stopped_early": steps < config.training.max_train_steps,
        "samples": samples,
        "config": identity(without_folders(replace(config, adapter=options))) | _numbers_of(adapter, options),
        **trained_on.as_json(),
    }
    _warn_if_diverged(rows, weights_step)
    remove_unfinished(output)
    with replacing_folder(output / ADAPTER) as folder:
        # diffusers' own `to` warns about parts that should stay in float32, but here all of them do.
        whole: Any = nn.Module.to(adapter, torch.float32)
        try:
            whole.save_pretrained(folder, safe_serialization=True)
        except SafetensorError as error:  # such as "no space left on device"
            raise OSError(f"output_dir: cannot write the adapter ({error})") from error
        (folder / FINISHED).write_text(json.dumps(record, indent=1) + "\n")
        if any("val_loss" in row or "loss" in row for row in rows):
            loss_plot(rows, folder / "loss.png")
        sheets = sorted((output / IMAGES).glob("step-*.png"))
        sheets = [sheet for sheet in sheets if sheet.stem <= f"step-{weights_step:08d}"]
        if sheets:
            shutil.copyfile(sheets[-1], folder / "samples.png")
        (folder / "README.md").write_text(
            model_card(adapter, method, config, record, rows, folder), encoding="utf-8"
        )
    return output / ADAPTER


def _numbers_of(adapter: Any, options: AdapterOptions) -> dict[str, Any]:
    """The numbers among the options as the adapter was built with them, also those that were derived."""
    return {
        f"adapter.{field.name}": adapter.config[field.name]
        for field in fields(options)
        if isinstance(adapter.config.get(field.name), int | float)
    }


def warn_of_finished(output: Path) -> None:
    """Warn if the finished run in `output` diverged, as `export` did."""
    record = json.loads((output / ADAPTER / FINISHED).read_bytes())
    _warn_if_diverged(read_json_lines(output / LOG, dict), record.get("weights_of_step", record["steps"]))


def _warn_if_diverged(rows: Sequence[Mapping[str, Any]], weights_step: int) -> None:
    if any(row.get("step") == weights_step and _is_diverged(row) for row in rows):
        warnings.warn(
            f"training: the run diverged: step {weights_step}, whose weights are exported, has no finite "
            "gradient or validation loss. Train in a new output_dir with a lower training.learning_rate or a "
            "longer warm-up",
            stacklevel=3,
        )


def model_card(
    adapter: nn.Module | Any,
    method: Method,
    config: TrainConfig,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> str:
    """Return the model card, as Markdown with the Hub's metadata. Local paths are cut to their last part."""
    shown = without_folders(config)
    base = "the embedded Stable Diffusion" if config.base.path == EMBEDDED else shown.base.path
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    source = config.hub.repo_id or "path/to/adapter"
    parts = [
        f"---\n{_metadata(config, shown)}\n---",
        f"# {method.label} for {config.data.condition}, on {base}",
        f"{parameters:,} parameters, {record['steps']:,} steps, {record['samples']:,} samples"
        + (", stopped early" if record["stopped_early"] else "")
        + (
            f"; weights of step {record['weights_of_step']:,}, which had the best validation score."
            if record["weights_of_step"] != record["steps"]
            else "."
        ),
        f"Training started from `{shown.adapter.start_from}`." if shown.adapter.start_from else "",
        f"## Use\n\n```python\n{method.card(adapter, shown.base.path, source)}\n```",
        _results(rows),
        "![Structure maps, and images generated from them](samples.png)"
        if (folder / "samples.png").exists()
        else "",
        "![Loss by step](loss.png)" if (folder / "loss.png").exists() else "",
        f"## Settings\n\n```toml\n{dump_config(shown)}```",
        "## Versions\n\n"
        + ", ".join([f"nexus-adapters {__version__}", *(f"{lib} {version(lib)}" for lib in _LIBRARIES)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: TrainConfig, shown: TrainConfig) -> str:
    """The card's metadata for the Hub, as YAML: license, base, library and tags."""
    is_hub_base = config.base.path == shown.base.path and "/" in config.base.path
    base_model = config.hub.base_model or (config.base.path if is_hub_base else None)
    data = ModelCardData(
        library_name="diffusers",
        license=config.hub.license or None,
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        tags=["nexus-adapters", "adapter", config.data.condition, "diffusion"],
    )
    return data.to_yaml()


def loss_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the validation loss, mean and by part of the schedule; without validation, the training loss."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if "val_loss" in row]
    if measured:
        steps = [row["step"] for row in measured]
        names = sorted(key for key in measured[0] if key.startswith("val_loss_"))
        colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(names)))  # darker for noisier timesteps
        for name, color in zip(names, colors, strict=True):
            label = f"t from {int(name.removeprefix('val_loss_'))}"
            axes.plot(steps, _numbers(measured, name), ".-", lw=1, color=color, label=label)
        axes.plot(steps, _numbers(measured, "val_loss"), ".-", color="black", lw=2, label="mean")
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
    else:
        pairs = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
        axes.plot([step for step, _ in pairs], [loss for _, loss in pairs], lw=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss on held-out samples" if measured else "training loss")
    figure.savefig(path, dpi=110)


def _is_diverged(row: Mapping[str, Any]) -> bool:
    """Whether a step was skipped, or its validation loss was not finite."""
    return bool(row.get("skipped")) or ("val_loss" in row and row["val_loss"] is None)


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A column of the log. Values that were not finite are null there and gaps in the plot."""
    return [float("nan") if row.get(name) is None else float(row[name]) for row in rows]


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in rows if "val_loss" in row]
    if not measured:
        return ""
    lines = ["## Validation", "", "| Step | Loss | Structure score |", "|---|---|---|"]
    kept = measured if len(measured) <= 12 else [*measured[:: -(-len(measured) // 11)], measured[-1]]
    for row in kept:
        score = f"{row['structure_score']:.3f}" if row.get("structure_score") is not None else ""
        loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.5f}"
        lines.append(f"| {row['step']:,} | {loss} | {score} |")
    return "\n".join(lines)


def push(folder: Path, hub: HubOptions) -> str:
    """Upload the finished adapter's folder to the Hub. Returns its URL.

    Raises:
        OSError: if the Hub cannot be reached or rejects the upload. The local folder is unchanged.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=hub_token())
    try:
        api.create_repo(hub.repo_id, private=hub.private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=hub.repo_id, folder_path=folder, commit_message="Add the adapter")
        )
    except Exception as error:  # the client and its libraries raise many kinds of exceptions
        reason = one_line(error)
        raise OSError(f"hub.repo_id: cannot upload to '{hub.repo_id}' ({reason})") from error


def check_hub(hub: HubOptions) -> None:
    """Raise `InvalidArgument` for an invalid repository name and for a missing token."""
    try:
        validate_repo_id(hub.repo_id)
    except HFValidationError as error:
        raise InvalidArgument("hub.repo_id", "name/repository", repr(hub.repo_id)) from error
    if hub_token() is None:
        raise InvalidArgument(
            "HF_TOKEN", hint="Set this environment variable to a Hub token with write access"
        )


def hub_token() -> str | None:
    """Return the Hub token from the environment; it is never read from a file."""
    return os.environ.get("HF_TOKEN")
