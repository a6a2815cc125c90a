"""Measure the embedded adapters on 500 test scenes: attribute binding, background and edges.

    python benchmarks/canny.py

Every method generates the same scenes from the same noise. Cells (a method with a policy) that were already
measured with the same code, weights and settings are read from the cache, so an interrupted run resumes.
Writes into results/:

- canny.csv: fractions in [0, 1], the means over scenes, with bootstrap 95 % intervals (over other scenes, but
  not over other trainings or noise), and paired differences to T2I-Adapter;
- canny_text.csv: the same for images in which only the adapter reads another scene's prompt;
- canny.json: settings, hashes of code, weights and tables, versions, machine, and attribute binding as
  fractions of all objects;
- canny.md: the fractions in canny.csv as a table for the README.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from machine import embedded_adapters, folder_hash, machine_facts, write_whole

import nexus_adapters
from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import BUNDLED, guidance_for
from nexus_adapters.embedded.held_out import SCENE_METRICS, TestScene, load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Images, Sampling, generate, reconstruct
from nexus_adapters.files import file_sha256, replacing
from nexus_adapters.methods import GenerationSettings
from nexus_adapters.metrics.intervals import bootstrap_mean
from nexus_adapters.metrics.structure import psnr_db

RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nexus-adapters" / "evaluation"
FIELDS = ("method", "policy", "metric", "value", "low", "high", "n", "seed")
POLICIES = ("positive", "per_branch")

# The parts of the package that determine images and scores.
CODE = ("adapter", "bases", "conditions", "embedded", "evaluation", "injection", "methods", "metrics")

# Label in the tables, as in the study -> name of the adapter.
NEXUS = {
    "prime": "prime-paper",
    "slim": "slim-paper",
    "prime+residual": "prime",
    "slim+residual": "slim",
}

Scores = dict[str, np.ndarray]  # metric -> one value per scene


@dataclass(frozen=True)
class Bench:
    """The scenes, the settings, and the hashes that identify them and the weights."""

    scenes: list[TestScene]
    sampling: Sampling
    base_hash: str
    code_hash: dict[str, str]
    cache: Path

    def measure(self, method: str, policy: str, adapter_hash: str, draw: Callable[[], Images]) -> Scores:
        """Return the scores of one cell, from the cache if they are there."""
        weights = [adapter_hash, self.base_hash]
        settings = [method, policy, len(self.scenes), asdict(self.sampling), machine_facts()["versions"]]
        identity = json.dumps([*weights, self.code_hash, *settings])
        path = self.cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            started = time.perf_counter()
            scores = score_images(draw(), self.scenes)
            print(f"{method} {policy}: {time.perf_counter() - started:.0f} s", flush=True)
            with replacing(path) as stream:
                np.savez(stream, **scores)
        with np.load(path) as stored:
            return {metric: stored[metric] for metric in SCENE_METRICS}


def measure_all(bench: Bench) -> dict[tuple[str, str], Scores]:
    """Return (method, policy) -> scores."""
    base = load_base()
    measured = {
        ("autoencoder", "none"): bench.measure(
            "autoencoder", "none", "", lambda: reconstruct(base.vae, bench.scenes)
        ),
        ("base", "none"): bench.measure(
            "base", "none", "", lambda: generate(base, None, bench.scenes, bench.sampling)
        ),
    }
    for method, name in {"t2i": "t2i", **NEXUS}.items():
        adapter = load_adapter(name)
        adapter_hash = folder_hash(BUNDLED["embedded"].adapter(name, "canny"))
        for policy in POLICIES if method in NEXUS else POLICIES[:1]:
            measured[method, policy] = bench.measure(
                method,
                policy,
                adapter_hash,
                lambda adapter=adapter, policy=policy: generate(
                    base, adapter, bench.scenes, bench.sampling, GenerationSettings(policy=policy)
                ),
            )
    return measured


def measure_swapped_text(bench: Bench) -> dict[tuple[str, str], Scores]:
    """As `measure_all` with policy `positive`, but only the adapter reads the next scene's prompt."""
    base = load_base()
    swapped = GenerationSettings(
        adapter_prompts=[scene.prompt for scene in bench.scenes[1:] + bench.scenes[:1]]
    )
    measured = {}
    for method, name in NEXUS.items():
        adapter = load_adapter(name)
        measured[method, "positive"] = bench.measure(
            f"{method} reading another prompt",
            "positive",
            folder_hash(BUNDLED["embedded"].adapter(name, "canny")),
            lambda adapter=adapter: generate(base, adapter, bench.scenes, bench.sampling, swapped),
        )
    return measured


def rows_of(measured: dict[tuple[str, str], Scores], reference: dict[str, Scores], seed: int) -> list[dict]:
    """Return a row per cell and metric, and per paired difference `metric_minus_NAME` to a reference."""
    rows = []
    for (method, policy), scores in measured.items():
        columns = dict(scores)
        for name, other in reference.items():
            if method != name:
                columns |= {
                    f"{metric}_minus_{name}": scores[metric] - other[metric] for metric in SCENE_METRICS
                }
        for metric, values in columns.items():
            value, low, high = (round(number, 4) for number in bootstrap_mean(values))
            row = (method, policy, metric, value, low, high, len(values), seed)
            rows.append(dict(zip(FIELDS, row, strict=True)))
    return rows


def markdown_table(rows: list[dict], parameters: dict[str, int]) -> str:
    """Return a table of percentages with intervals, one line per cell, without the differences."""
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["policy"]), {})[row["metric"]] = row
    lines = [
        "| Method | Policy | Parameters | Colors, % | Materials, % | Background, % | Edge F1, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, policy), found in cells.items():
        count = f"{parameters[method] / 1e6:.2f}M" if method in parameters else ""
        shown = [
            "{:.1f} ({:.1f} to {:.1f})".format(
                *(100 * float(found[metric][f]) for f in ("value", "low", "high"))
            )
            for metric in SCENE_METRICS
        ]
        lines.append("| " + " | ".join([method, policy.replace("none", ""), count, *shown]) + " |")
    return "\n".join(lines) + "\n"


def csv_text(rows: list[dict]) -> str:
    """Return the rows as CSV with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def code_digest(part: Path) -> str:
    """Return the SHA-256 of a module or of a package's modules."""
    return folder_hash(part, ".py") if part.is_dir() else file_sha256(part)


def bound_objects(
    measured: dict[tuple[str, str], Scores], scenes: list[TestScene]
) -> dict[str, dict[str, float]]:
    """Return, for each cell, the fraction of all objects with the correct property.

    Unlike the mean over scenes, a scene with four objects counts twice as much as one with two.
    """
    counts = [len(scene.scene.objects) for scene in scenes]
    return {
        " ".join(cell): {
            metric: round(float(np.average(scores[metric], weights=counts)), 4)
            for metric in ("binding_color", "binding_material")
        }
        for cell, scores in measured.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=guidance_for("embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of measured cells")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    sampling = Sampling(args.steps, args.guidance_scale, args.seed)
    scenes = load_test_scenes(args.scenes)
    package = Path(nexus_adapters.__file__).parent
    code_hash = {part: code_digest(package / part) for part in CODE}
    bench = Bench(scenes, sampling, folder_hash(BUNDLED["embedded"].folder), code_hash, args.cache)
    measured = measure_all(bench)
    t2i = {"t2i": measured["t2i", "positive"]}
    rows = rows_of(measured, t2i, args.seed)
    swapped = [
        row
        for cell, scores in measure_swapped_text(bench).items()
        for row in rows_of({cell: scores}, {"own_prompt": measured[cell]}, args.seed)
    ]
    reconstructions = reconstruct(load_base().vae, scenes)
    psnr = [
        psnr_db(image, scene.rendering.image) for image, scene in zip(reconstructions, scenes, strict=True)
    ]
    parameters = {
        method: sum(weight.numel() for weight in load_adapter(name).parameters())
        for method, name in {"t2i": "t2i", **NEXUS}.items()
    }
    tables = {
        "canny.csv": csv_text(rows),
        "canny_text.csv": csv_text(swapped),
        "canny.md": markdown_table(rows, parameters),
    }
    for name, text in tables.items():
        write_whole(args.out / name, text)
    settings = {
        "sampling": asdict(sampling),
        "scenes": args.scenes,
        "tables_sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in tables.items()},
        "code_sha256": code_hash,
        "base_sha256": bench.base_hash,
        "adapters_sha256": {
            stored: folder_hash(BUNDLED["embedded"].adapter(name, "canny"))
            for stored, name in embedded_adapters("canny").items()
        },
        "adapter_parameters": parameters,
        "autoencoder_psnr_db": round(float(np.mean(psnr)), 2),
        "share_of_all_objects": bound_objects(measured, scenes),
    }
    write_whole(args.out / "canny.json", json.dumps(settings | machine_facts(), indent=2) + "\n")


if __name__ == "__main__":
    main()
