"""Compare two ways to generate with the package's adapters, on every map: the default, and fading features.

    python benchmarks/ways.py

Prime and Slim generate 100 test scenes starting at seed 20,000, as in balances.py, from the same noise: with
policy `positive` and equally strong features in all steps, and with `cond_only` and `noise_exponent` 0.5.
Depth and segmentation are judged by the models of scripts/train_judges.py or, without them, only by edges and
colors. The same command resumes an interrupted run. Writes results/ways.json: the scores of the default and
the paired differences of the other, with 95 % intervals.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from machine import benchmark_parser, folder_hash, report

from nexus_adapters.bundled import BUNDLED, guidance_for, weights_folder
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.run import evaluate
from nexus_adapters.files import cache_folder
from nexus_adapters.training.config import DataOptions

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "cond_only+fades_half": {"policy": "cond_only", "noise_exponent": 0.5},
}
FIRST, COUNT = 20_000, 100
# Label in the results -> name of the adapter.
ADAPTERS = {"prime-residual": "prime", "slim-residual": "slim"}


def config_of(condition: str, way: str, quick: bool) -> EvaluationConfig:
    """Return the config of an evaluation with the embedded base."""
    judge = cache_folder() / "judges" / condition / "model"
    config = EvaluationConfig(
        data=DataOptions(
            kind="scenes", condition=condition, split="test", count=2 if quick else COUNT, resolution=128
        ),
        first=FIRST,
        guidance_scale=guidance_for("embedded"),
        num_inference_steps=1 if quick else 20,
        batch_size=50,
        clip="" if quick else "embedded",
        features="" if quick else "embedded",
        judge={"model": str(judge)} if judge.is_dir() and not quick else {},
    )
    return replace(config, **WAYS[way])


def main(arguments: list[str] | None = None) -> None:
    """Generate missing images, and compare."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "ways", help="folder of the images")
    known = list(BUNDLED["embedded"].adapters)
    parser.add_argument("--conditions", nargs="+", choices=known, default=known)
    args = parser.parse_args(arguments)
    measured: dict[str, Any] = {}
    for condition in args.conditions:
        found = {}
        for way in WAYS:
            out = args.folder / f"{condition}-{way}"
            found[way] = evaluate(config_of(condition, way, args.quick), ADAPTERS, out)
        told: dict[str, Any] = {}
        for name in ADAPTERS:
            default, better = (each.methods[name].measured for each in found.values() if each is not None)
            told[name] = {
                "default": {metric: default.value(metric) for metric in default.metrics},
                "minus_default": {
                    metric: asdict(estimate) for metric, estimate in better.minus(default).estimates().items()
                },
            }
        measured[condition] = told
    drawn = config_of(args.conditions[0], "default", args.quick)
    settings = {
        "ways": WAYS,
        "first_seed": FIRST,
        "scenes": drawn.data.count,
        "steps": drawn.num_inference_steps,
        "seed": drawn.seed,
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", *args.conditions)},
    }
    report("ways", args, settings, measured)


if __name__ == "__main__":
    main()
