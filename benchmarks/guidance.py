"""Choose the guidance scale of the embedded adapters, on test scenes that canny.py does not use.

    python benchmarks/guidance.py

Writes results/guidance.json: the mean scores of every method by guidance scale, and `guidance_scale`, the
scale with the highest color binding plus edge F1 on average over all methods.
"""

from __future__ import annotations

from collections.abc import Mapping

from machine import benchmark_parser, embedded_adapters, folder_hash, report
from tqdm import tqdm

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import weights_folder
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Sampling, generate

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0)
FIRST_SEED = 10_000  # far beyond the scenes of the results

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # method -> guidance scale -> metric -> mean


def scores_by_guidance(scenes: list[TestScene], steps: int) -> Scores:
    """Return the scores of every method with policy `positive`."""
    base, names = load_base(), embedded_adapters("canny")
    found: dict[str, dict[str, dict[str, float]]] = {method: {} for method in names}
    cells = [(method, scale) for method in found for scale in GUIDANCE_SCALES]
    for method, scale in tqdm(cells, unit="cell"):
        adapter = load_adapter(names[method])
        images = generate(base, adapter, scenes, Sampling(steps, scale), show_progress=False)
        scores = score_images(images, scenes)
        found[method][f"{scale:g}"] = {name: round(float(v.mean()), 4) for name, v in scores.items()}
    return found


def merit(scores: Mapping[str, float]) -> float:
    """Return the merit by which this script and chosen.py choose: color binding plus edge F1."""
    return scores["binding_color"] + scores["edge_f1"]


def best_scale(scores: Scores) -> str:
    """Return the scale with the highest mean merit, or the lower of equal ones."""
    return max(
        (f"{scale:g}" for scale in GUIDANCE_SCALES),
        key=lambda scale: sum(merit(by_scale[scale]) for by_scale in scores.values()),
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    args = parser.parse_args(arguments)
    count, steps = (2, 2) if args.quick else (args.scenes, args.steps)
    scores = scores_by_guidance(load_test_scenes(count, first_seed=FIRST_SEED), steps)
    measured = {"scores": scores, "guidance_scale": float(best_scale(scores))}
    settings = {
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "steps": steps,
        "seed": Sampling().seed,
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", "canny")},
    }
    report("guidance", args, settings, measured)


if __name__ == "__main__":
    main()
