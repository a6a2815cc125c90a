"""Measure the time that `nexus evaluate` spends on anything but generating images.

    python benchmarks/evaluation_share.py

The base, T2I-Adapter and Prime generate scenes of the embedded world. Each round runs a bare loop that
generates the batches in memory, and the evaluator with all metrics of a scene and the embedded CLIP's scores
and distances, including writing images, scores and report. Both load base and adapters once; the evaluator
also reads the data once more to hash them. Writes results/evaluation_share.json. The target is 15 %.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from machine import benchmark_parser, report

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import guidance_for
from nexus_adapters.evaluation.cases import Cases, open_cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.estimates import batches
from nexus_adapters.evaluation.generation import generate_batch
from nexus_adapters.evaluation.report import write_report
from nexus_adapters.evaluation.run import evaluate
from nexus_adapters.methods import GenerationSettings
from nexus_adapters.training.config import DataOptions

ADAPTERS = {"t2i": "t2i", "prime": "prime"}


def bare_loop(config: EvaluationConfig, cases: Cases) -> None:
    """Load everything and generate all batches with every method, without keeping anything."""
    base = load_base(config.base.source, safety_checker=None)
    adapters = [None, *(load_adapter(name) for name in ADAPTERS.values())]
    for places in batches(len(cases), config.batch_size):
        chosen = cases[places.start : places.stop]
        for adapter in adapters:
            generate_batch(base, adapter, chosen, places.start, config.sampling, GenerationSettings())


def measure(count: int, steps: int, rounds: int) -> dict[str, object]:
    """Return the seconds of both in every round, and the evaluator's overhead relative to generating."""
    seconds: dict[str, list[float]] = {"bare_loop": [], "evaluator": []}
    with tempfile.TemporaryDirectory() as place:
        config = EvaluationConfig(
            data=DataOptions(kind="scenes", split="test", count=count, resolution=128),
            num_inference_steps=steps,
            guidance_scale=guidance_for("embedded"),
            batch_size=20,
            clip="embedded",
            features="embedded",
        )
        for number in range(rounds):
            cases = open_cases(config, Path(place), 8)
            start = time.perf_counter()
            bare_loop(config, cases)
            middle = time.perf_counter()
            found = evaluate(config, ADAPTERS, Path(place) / str(number), show_progress=False)
            assert found is not None
            write_report(found)
            seconds["bare_loop"].append(middle - start)
            seconds["evaluator"].append(time.perf_counter() - middle)
    shares = [own / bare - 1 for own, bare in zip(seconds["evaluator"], seconds["bare_loop"], strict=True)]
    return {
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "share_over_drawing": [round(value, 4) for value in shares],
        "share_over_drawing_median": round(statistics.median(shares), 4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    count, steps, rounds = (40, 1, 1) if args.quick else (args.scenes, 20, args.rounds)
    settings = {"scenes": count, "steps": steps, "rounds": rounds, "methods": ["base", *ADAPTERS]}
    report("evaluation_share", args, settings, measure(count, steps, rounds))


if __name__ == "__main__":
    main()
