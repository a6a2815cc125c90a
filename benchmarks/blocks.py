"""Compare other blocks of about the same size with those of Prime and Slim: is any better in all metrics?

    python benchmarks/blocks.py

Each block in trial_blocks.py replaces that of Prime and Slim and is trained and evaluated as a cell of
benchmarks/plans/study.toml on canny. The tables also show T2I-Adapter, Prime and Slim from that study. An
interrupted run resumes. Changes to a block's code are not detected: delete results/blocks.npz and
nexus-adapters/study/blocks in the cache folder. Writes results/blocks.csv, .md and .json.

    gate       the attention is weighted per pixel and channel by a sigmoid of the pixel
    gate-level the attention is weighted per level by one number
    first      attention before the two residual units, which then see its result
    film       no attention: the mean of the prompt scales and shifts the channels between the two units
    twice      a second attention after that of the coarsest level
"""

from __future__ import annotations

import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import trial_blocks
from machine import RESULTS, benchmark_parser, report, write_whole

from nexus_adapters.study.cells import run_study
from nexus_adapters.study.plan import Cell, CellGroup, Study
from nexus_adapters.study.results import CellResult, results_of
from nexus_adapters.study.tables import study_csv, study_markdown

PLAN = Path(__file__).parent / "plans" / "study.toml"
BESIDE = ("t2i", "prime+residual", "slim+residual")  # from the study
VARIANTS = BESIDE[1:]
BLOCKS = ("gate", "gate-level", "first", "film", "twice")
SEEDS = (0, 1, 2)


def plan_of(folder: Path, quick: bool) -> Study:
    """Write the study's plan with the blocks as its only methods into `folder`, and return it."""
    plan: dict[str, Any] = tomllib.loads(PLAN.read_text())
    plan["recipe"] = str((PLAN.parent / plan["recipe"]).resolve())
    plan["results"] = str(RESULTS / "blocks.npz")
    plan["train"]["imports"] = [trial_blocks.__name__]
    methods = {BESIDE[0]: plan["methods"][BESIDE[0]]}
    for variant in VARIANTS:
        train = plan["methods"][variant]["train"]
        for name in BLOCKS:
            methods[f"{variant}+{name}"] = {"train": train | {"adapter": train["adapter"] | {"block": name}}}
    plan["methods"] = methods
    seeds = SEEDS[:1] if quick else SEEDS
    plan["cells"] = [{"conditions": ["canny"], "methods": list(plan["methods"])[1:], "seeds": list(seeds)}]
    if quick:
        plan |= {"results": str(folder / "results.npz"), "folder": str(folder / "study"), "views": {}}
        plan["train"] |= {"training": {"max_train_steps": 1, "batch_size": 2}, "data": {"count": 4}}
        plan["train"] |= {"cache": {"enabled": False}, "validation": {"every_steps": 0}}
        plan["evaluate"] = {"data": plan["evaluate"]["data"] | {"count": 2}, "num_inference_steps": 1}
    path = folder / "blocks.toml"
    path.write_text(tomli_w.dumps(plan))
    return Study(path)


def of_the_study(seeds: set[int]) -> dict[Cell, CellResult]:
    """Return the study's results, for these seeds, of the methods that the blocks are compared to."""
    cells = [Cell("canny", method, seed) for method in BESIDE for seed in sorted(seeds)]
    found = results_of(Study(PLAN))
    return {cell: found[cell] for cell in cells if cell in found}


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate unfinished cells, and report all of them."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--blocks",
        nargs="*",
        choices=BLOCKS,
        default=BLOCKS,
        help="without names, only report finished cells",
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        study = plan_of(Path(temporary), args.quick)
        whole, chosen = study.plan, [c for c in study.cells() if c.method.rpartition("+")[2] in args.blocks]
        if chosen:
            cells = tuple(CellGroup((c.condition,), (c.method,), (c.seed,)) for c in chosen)
            study.plan = replace(whole, cells=cells)
            run_study(study)
            study.plan = whole
        blocks = dict(results_of(study))
        results = ({} if args.quick else of_the_study({cell.seed for cell in blocks})) | blocks
        out = args.out or (None if args.quick else RESULTS)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "blocks.csv", study_csv(results))
            write_whole(out / "blocks.md", study_markdown(study, results))
        about = {cell.name: {"facts": result.facts, **result.made_with} for cell, result in results.items()}
    report("blocks", args, {"plan": PLAN.name}, {"cells": about})


if __name__ == "__main__":
    main()
