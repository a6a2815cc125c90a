"""Scores by guidance scale of the embedded adapters, on test scenes that canny.py does not draw.

    python benchmarks/guidance.py

Writes results/guidance.json: the mean scores of T2I-Adapter and Prime by guidance scale.
"""

from __future__ import annotations

from machine import benchmark_parser, report

from nexus_adapters.embedded import BETTER_FORM, embedded_adapter, load_embedded_base
from nexus_adapters.evaluation.methods import Sampling, generate
from nexus_adapters.evaluation.scenes import TestScene, load_test_scenes, score_images

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 5.0)
FIRST_SEED = 10_000  # far behind the scenes of the results


def scores_by_guidance(scenes: list[TestScene], steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> guidance scale -> mean of each metric."""
    base = load_embedded_base()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in ("t2i", BETTER_FORM["prime"]):
        adapter = embedded_adapter(method)
        found[method] = {}
        for scale in GUIDANCE_SCALES:
            scores = score_images(generate(base, adapter, scenes, Sampling(steps, scale)), scenes)
            found[method][str(scale)] = {name: round(float(v.mean()), 4) for name, v in scores.items()}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    args = parser.parse_args(arguments)
    count, steps = (2, 2) if args.quick else (args.scenes, args.steps)
    measured = scores_by_guidance(load_test_scenes(count, first_seed=FIRST_SEED), steps)
    settings = {"test_scenes": count, "first_seed": FIRST_SEED, "steps": steps, "seed": Sampling().seed}
    report("guidance", args, settings, measured)


if __name__ == "__main__":
    main()
