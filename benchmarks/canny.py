"""Measure the embedded adapters on 500 test scenes: attribute binding, background and edges.

    python benchmarks/canny.py

Every method draws the same scenes from the same noise. Cells (a method under a policy) that were measured
before with the same weights and settings are taken from the cache, so an interrupted run goes on. Writes into
results/:

- canny.csv: fractions in [0, 1] with bootstrap 95 % intervals, and paired differences to T2I-Adapter;
- canny_text.csv: the same scenes, where the adapter alone reads another scene's prompt;
- canny.json: settings, versions, machine.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from machine import machine_facts

from nexus_adapters import embedded
from nexus_adapters.evaluation.methods import Images, Sampling, generate, reconstruct
from nexus_adapters.evaluation.scenes import METRICS, TestScene, load_test_scenes, score_images
from nexus_adapters.metrics.bootstrap import bootstrap_mean

RESULTS = Path(__file__).parent / "results"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nexus-adapters" / "evaluation"
FIELDS = ("method", "policy", "metric", "value", "low", "high", "n", "seed")
POLICIES = ("positive", "per_branch")

# As the CSV names it -> as the weights are stored.
NEXUS = {
    "prime": "prime",
    "slim": "slim",
    "prime+residual": "prime-residual",
    "slim+residual": "slim-residual",
}

Scores = dict[str, np.ndarray]  # metric -> one value per scene


@dataclass(frozen=True)
class Bench:
    """The scenes, the settings and what identifies both and the weights."""

    scenes: list[TestScene]
    sampling: Sampling
    base_hash: str

    def measure(self, method: str, policy: str, adapter_hash: str, draw: Callable[[], Images]) -> Scores:
        """The scores of one cell, from the cache where it has them."""
        identity = [method, policy, adapter_hash, self.base_hash, len(self.scenes), asdict(self.sampling)]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = CACHE / f"{key}.npz"
        if not path.exists():
            started = time.perf_counter()
            scores = score_images(draw(), self.scenes)
            print(f"{method} {policy}: {time.perf_counter() - started:.0f} s", flush=True)
            CACHE.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **scores)
            os.replace(partial, path)
        with np.load(path) as stored:
            return {metric: stored[metric] for metric in METRICS}


def weights_hash(*folders: Path) -> str:
    """SHA-256 over all weight files below `folders`."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def measure_all(bench: Bench) -> dict[tuple[str, str], Scores]:
    """(method, policy) -> scores."""
    base = embedded.load_embedded_base()
    measured = {
        ("autoencoder", "none"): bench.measure(
            "autoencoder", "none", "", lambda: reconstruct(base, bench.scenes)
        ),
        ("base", "none"): bench.measure(
            "base", "none", "", lambda: generate(base, None, bench.scenes, bench.sampling)
        ),
    }
    for method, stored in {"t2i": "t2i", **NEXUS}.items():
        adapter = embedded.embedded_adapter(stored)
        adapter_hash = weights_hash(embedded.WEIGHTS / "canny" / stored)
        for policy in POLICIES if method in NEXUS else POLICIES[:1]:
            measured[method, policy] = bench.measure(
                method,
                policy,
                adapter_hash,
                lambda adapter=adapter, policy=policy: generate(
                    base, adapter, bench.scenes, bench.sampling, policy
                ),
            )
    return measured


def measure_swapped_text(bench: Bench) -> dict[tuple[str, str], Scores]:
    """As `measure_all` under `positive`, but the adapter alone reads the next scene's prompt."""
    base = embedded.load_embedded_base()
    others = [scene.prompt for scene in bench.scenes[1:] + bench.scenes[:1]]
    measured = {}
    for method, stored in NEXUS.items():
        adapter = embedded.embedded_adapter(stored)
        measured[method, "positive"] = bench.measure(
            f"{method} reading another prompt",
            "positive",
            weights_hash(embedded.WEIGHTS / "canny" / stored),
            lambda adapter=adapter: generate(
                base, adapter, bench.scenes, bench.sampling, adapter_prompts=others
            ),
        )
    return measured


def rows_of(measured: dict[tuple[str, str], Scores], reference: dict[str, Scores], seed: int) -> list[dict]:
    """One row a cell and metric, and one for each paired difference `metric_minus_NAME` to a reference."""
    rows = []
    for (method, policy), scores in measured.items():
        columns = dict(scores)
        for name, other in reference.items():
            if method != name:
                columns |= {f"{metric}_minus_{name}": scores[metric] - other[metric] for metric in METRICS}
        for metric, values in columns.items():
            value, low, high = (round(number, 4) for number in bootstrap_mean(values))
            row = (method, policy, metric, value, low, high, len(values), seed)
            rows.append(dict(zip(FIELDS, row, strict=True)))
    return rows


def psnr_db(images: Images, scenes: list[TestScene]) -> float:
    """The mean over images of their peak signal-to-noise ratio, in dB, at a peak of 255."""
    pairs = zip(images, (scene.rendering.image for scene in scenes), strict=True)
    squared = np.array([np.square(image / 255.0 - true / 255.0).mean() for image, true in pairs])
    return float((-10 * np.log10(squared)).mean())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the rows, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)
    print(f"wrote {path}")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=embedded.EMBEDDED_GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sampling = Sampling(args.steps, args.guidance_scale, args.seed)
    scenes = load_test_scenes(args.scenes)
    bench = Bench(scenes, sampling, weights_hash(embedded.WEIGHTS / "base"))
    measured = measure_all(bench)
    t2i = {"t2i": measured["t2i", "positive"]}
    write_csv(args.out / "canny.csv", rows_of(measured, t2i, args.seed))
    swapped = [
        row
        for cell, scores in measure_swapped_text(bench).items()
        for row in rows_of({cell: scores}, {"own_prompt": measured[cell]}, args.seed)
    ]
    write_csv(args.out / "canny_text.csv", swapped)
    settings = {
        "sampling": asdict(sampling),
        "scenes": args.scenes,
        "base_sha256": bench.base_hash,
        "autoencoder_psnr_db": round(psnr_db(reconstruct(embedded.load_embedded_base(), scenes), scenes), 2),
    }
    (args.out / "canny.json").write_text(json.dumps(settings | machine_facts(), indent=2) + "\n")


if __name__ == "__main__":
    main()
