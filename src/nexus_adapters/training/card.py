"""The model card next to a trained adapter's weights: how it was made and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData
from torch import nn

from nexus_adapters import __version__
from nexus_adapters.bases.source import EMBEDDED
from nexus_adapters.methods import Method
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.public import without_folders
from nexus_adapters.training.recipe import dump_config

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


def model_card(
    adapter: nn.Module | Any,
    method: Method,
    config: TrainConfig,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> str:
    """Markdown with the Hub's metadata. Folders of the machine are named by their last part alone."""
    shown = without_folders(config)
    base = "the embedded Stable Diffusion" if config.base.path == EMBEDDED else shown.base.path
    is_hub_base = config.base.path == shown.base.path and "/" in config.base.path
    data = ModelCardData(
        library_name="diffusers",
        base_model=config.base.path if is_hub_base else None,
        tags=["nexus-adapters", "adapter", config.data.condition, "diffusion"],
    )
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    source = config.hub.repo_id or "path/to/adapter"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {method.label} for {config.data.condition}, on {base}",
        f"{parameters:,} parameters, {record['steps']:,} steps, {record['samples']:,} samples"
        + (", stopped early." if record["stopped_early"] else "."),
        f"## Use\n\n```python\n{method.card(adapter, shown.base.path, source)}\n```",
        _results(rows),
        "![Conditions, and pictures drawn from them](samples.png)"
        if (folder / "samples.png").exists()
        else "",
        "![Loss by step](loss.png)" if (folder / "loss.png").exists() else "",
        f"## Settings\n\n```toml\n{dump_config(shown)}```",
        "## Versions\n\n"
        + ", ".join([f"nexus-adapters {__version__}", *(f"{lib} {version(lib)}" for lib in _LIBRARIES)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loss_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The validation's loss by step, mean and by part of the schedule; without one, the steps' own."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if "val_loss" in row]
    if measured:
        steps = [row["step"] for row in measured]
        names = sorted(key for key in measured[0] if key.startswith("val_loss_"))
        colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(names)))  # the noisier, the darker
        for name, color in zip(names, colors, strict=True):
            label = f"t from {int(name.removeprefix('val_loss_'))}"
            axes.plot(steps, [row[name] for row in measured], ".-", lw=1, color=color, label=label)
        axes.plot(steps, [row["val_loss"] for row in measured], ".-", color="black", lw=2, label="mean")
        figure.legend(loc="outside right center", fontsize=8, frameon=False)
    else:
        pairs = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
        axes.plot([step for step, _ in pairs], [loss for _, loss in pairs], lw=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss on held-out samples" if measured else "loss of the step")
    figure.savefig(path, dpi=110)


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in rows if "val_loss" in row]
    if not measured:
        return ""
    lines = ["## Validation", "", "| Step | Loss | Structure score |", "|---|---|---|"]
    kept = measured if len(measured) <= 12 else [*measured[:: -(-len(measured) // 11)], measured[-1]]
    for row in kept:
        score = f"{row['structure_score']:.3f}" if "structure_score" in row else ""
        lines.append(f"| {row['step']:,} | {row['val_loss']:.5f} | {score} |")
    return "\n".join(lines)
