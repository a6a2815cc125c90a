"""Measure how level scales affect structure and colors, to choose the balance "control".

    python benchmarks/balances.py

Generates test scenes that canny.py does not use, with the package's Prime and several level scales. Writes
results/balances.json: means of color binding and edge F1 for each, with 95 % intervals.
"""

from __future__ import annotations

from machine import benchmark_parser, folder_hash, report
from tqdm import tqdm

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import guidance_for, weights_folder
from nexus_adapters.embedded.held_out import load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Sampling, generate
from nexus_adapters.injection.scales import LEVEL_SCALES
from nexus_adapters.methods import GenerationSettings
from nexus_adapters.metrics.intervals import bootstrap_mean

FIRST_SEED = 20_000
METRICS = ("binding_color", "edge_f1")
# Level scales and policy. The web UI's "control" applies its soft weights only to the prompt's branch.
CANDIDATES: list[tuple[tuple[float, ...], str]] = [
    (LEVEL_SCALES["balanced"], "positive"),
    (LEVEL_SCALES["prompt"], "positive"),
    (LEVEL_SCALES["prompt"], "cond_only"),
    (LEVEL_SCALES["balanced"], "cond_only"),
    ((1.25, 1.25, 1.25, 1.25), "positive"),
    ((1.5, 1.5, 1.5, 1.5), "positive"),
    ((1.5, 1.25, 1.0, 1.0), "positive"),
    ((1.0, 1.0, 1.25, 1.5), "positive"),
]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    args = parser.parse_args(arguments)
    count, steps = (2, 2) if args.quick else (args.scenes, args.steps)
    base, scenes = load_base(), load_test_scenes(count, first_seed=FIRST_SEED)
    adapter = load_adapter("prime")
    sampling = Sampling(steps, guidance_for("embedded"))
    rows = []
    for numbers, policy in tqdm(CANDIDATES, unit="cell"):
        control = GenerationSettings(policy=policy, level_scales=numbers)
        images = generate(base, adapter, scenes, sampling, control, show_progress=False)
        scores = score_images(images, scenes)
        means = {
            name: dict(zip(("value", "low", "high"), map(float, bootstrap_mean(scores[name])), strict=True))
            for name in METRICS
        }
        rows.append({"level_scales": list(numbers), "policy": policy, **means})
    settings = {
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "steps": steps,
        "guidance_scale": guidance_for("embedded"),
        "seed": sampling.seed,
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", "canny")},
    }
    report("balances", args, settings, {"rows": rows})


if __name__ == "__main__":
    main()
