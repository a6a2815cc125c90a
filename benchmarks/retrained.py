"""Do adapters that `nexus train` makes reach the figures of those that come with the package?

    nexus train recipes/embedded-canny.toml --set output_dir=RUNS/prime
    nexus train recipes/embedded-canny.toml --set output_dir=RUNS/slim --set adapter.method=slim
    nexus train recipes/embedded-canny.toml --set output_dir=RUNS/t2i --set adapter.method=t2i \
        --set adapter.residual=false
    python benchmarks/retrained.py RUNS

Draws the 500 test scenes of canny.py with each adapter in RUNS, as canny.py does under `positive`, and writes
results/retrained.json: means with 95 % intervals, and the paired difference to the adapter of the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from diffusers import T2IAdapter
from machine import benchmark_parser, folder_hash, report

from nexus_adapters import NexusAdapter
from nexus_adapters.embedded import BETTER_FORM, embedded_adapter, load_embedded_base
from nexus_adapters.evaluation.methods import Sampling, generate
from nexus_adapters.evaluation.scenes import load_test_scenes, score_images
from nexus_adapters.metrics.bootstrap import bootstrap_mean

METHODS = ("t2i", "slim", "prime")


def with_interval(values: np.ndarray) -> dict[str, float]:
    """Mean, and the ends of its 95 % interval."""
    return dict(zip(("value", "low", "high"), (round(v, 4) for v in bootstrap_mean(values)), strict=True))


def measure(folders: Mapping[str, Path], count: int, sampling: Sampling) -> dict[str, object]:
    """Method -> metric -> its value, and the difference to that of the package's adapter."""
    base, scenes = load_embedded_base(), load_test_scenes(count)
    found: dict[str, object] = {}
    for method, folder in folders.items():
        kind = T2IAdapter if method == "t2i" else NexusAdapter
        trained = kind.from_pretrained(folder, local_files_only=True)
        shipped = embedded_adapter(BETTER_FORM.get(method, method))
        ours, theirs = (
            score_images(generate(base, adapter, scenes, sampling), scenes) for adapter in (trained, shipped)
        )
        found[method] = {
            metric: with_interval(ours[metric])
            | {"minus_shipped": with_interval(ours[metric] - theirs[metric])}
            for metric in ours
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "runs", type=Path, metavar="RUNS", help="folder of the runs, each named by its method"
    )
    parser.add_argument("--scenes", type=int, default=500)
    args = parser.parse_args(arguments)
    folders = {m: args.runs / m / "adapter" for m in METHODS if (args.runs / m / "adapter").is_dir()}
    if not folders:
        parser.error(f"RUNS: expected runs named {', '.join(METHODS)}; received none in '{args.runs}'")
    count, steps = (2, 2) if args.quick else (args.scenes, 20)
    sampling = Sampling(steps)
    settings = {
        "test_scenes": count,
        "steps": steps,
        "guidance_scale": sampling.guidance_scale,
        "policy": "positive",
        "seed": sampling.seed,
        "training": {m: json.loads((folder / "training.json").read_text()) for m, folder in folders.items()},
        "adapter_sha256": {method: folder_hash(folder, ".safetensors") for method, folder in folders.items()},
    }
    report("retrained", args, settings, measure(folders, count, sampling))


if __name__ == "__main__":
    main()
