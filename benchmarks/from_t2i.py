"""How soon does an adapter that starts from a T2I-Adapter read the prompt, and does it need fewer steps?

    python benchmarks/from_t2i.py rates        (first: the learning rates, chosen on other scenes)
    python benchmarks/from_t2i.py train        (hours; may run twice at the same time, on a core each)
    python benchmarks/from_t2i.py report

Prime (residual, eight heads) on the embedded base, canny and segmentation, two seeds, 1,000 steps of 32 on
24,000 scenes, as benchmarks/recipe.toml has it, in three ways:

    scratch     new weights
    all         the T2I-Adapter's weights with a new attention that starts at zero; all weights are trained
    attention   the same start; only the attention and its LayerNorm are trained

Checkpoints after 125, 250, 500 and 1,000 steps, and the T2I-Adapter itself (step 0), generate 100 test scenes
from the same noise in 20 steps. On canny, the T2I-Adapter is the embedded one; on segmentation, it is trained
here by the same recipe. The learning rate of each way is chosen after a run of 125 steps (canny, seed 0) by
colors plus edge F1 on 64 scenes that are used nowhere else here. In the long runs, the rate falls by a cosine
over 1,000 steps, so a run that ends at 125, 250 or 500 steps could do better than the checkpoint there. The
intervals are over images, not over trainings. An interrupted run resumes. Writes results/from_t2i.npz (scores
of each image), .json (settings, means, intervals) and .webp (the curve).
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from guidance import FIRST_SEED as RATE_SCENES_SEED
from guidance import merit
from machine import RESULTS, folder_hash, machine_facts, write_whole
from matplotlib.figure import Figure

from nexus_adapters import load_adapter, load_base
from nexus_adapters.bundled import weights_folder
from nexus_adapters.embedded.held_out import load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Sampling, generate
from nexus_adapters.files import cache_folder, lock, replacing
from nexus_adapters.metrics.intervals import MeanInterval, bootstrap_mean
from nexus_adapters.training.recipe import parse_config
from nexus_adapters.training.run import train_adapter
from nexus_adapters.training.run_folder import ADAPTER, CHECKPOINTS

RECIPE = Path(__file__).parent / "recipe.toml"
CONDITIONS, SEEDS, WAYS = ("canny", "segmentation"), (0, 1), ("scratch", "all", "attention")
STEPS = (125, 250, 500, 1000)
RATES = {"all": (1e-2, 3e-3), "attention": (1e-2, 3e-3)}
RATE_STEPS, RATE_SCENES = 125, 64
SCENES, FIRST_SEED = 100, 40_000
METRICS = ("binding_color", "binding_material", "edge_f1")
START = "t2i"  # in names of results: the adapter that the others start from
LABELS = {
    "scratch": "new weights",
    "all": "T2I-Adapter, all weights trained",
    "attention": "T2I-Adapter, attention trained",
}
HYPOTHESIS = (  # written before the first training
    "Attention alone gains colors over the T2I-Adapter within 250 steps and never loses a point of edge F1. "
    "Training all weights reaches, within 500 steps, the colors of new weights after 1,000. After 1,000 "
    "steps the two differ by less than 2 points, and attention alone has fewer colors than all weights."
)

Scores = dict[str, np.ndarray]


class Store:
    """Scores of every image by name, in one file; several processes may add to it."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.locks = path, folder / "locks"

    def read(self) -> Scores:
        if not self.path.is_file():
            return {}
        with np.load(self.path) as archive:
            return {name: archive[name] for name in sorted(archive.files)}

    def add(self, name: str, scores: Mapping[str, np.ndarray]) -> None:
        new = {f"{name}/{metric}": scores[metric].astype(np.float32) for metric in METRICS}
        with lock(self.locks / "store"):
            found = self.read() | new
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                np.savez_compressed(file, **{key: found[key] for key in sorted(found)})
        means = ", ".join(f"{metric} {scores[metric].mean():.3f}" for metric in METRICS)
        print(f"{name}: {means}", file=sys.stderr, flush=True)

    def has(self, name: str) -> bool:
        return f"{name}/{METRICS[0]}" in self.read()


def recipe(way: str, condition: str, seed: int, start: str, out: Path, rate: float, steps: int) -> Any:
    """The recipe of one training. `start`: the T2I-Adapter."""
    content: dict[str, Any] = tomllib.loads(RECIPE.read_text())
    content |= {"output_dir": str(out), "seed": seed, "validation": {"every_steps": 0}}
    content["data"]["condition"] = condition
    if way == START:
        content["adapter"] = {"method": "t2i"}
    else:
        content["adapter"] = {"method": "prime", "heads": 8, "head_width": 8}
        if way != "scratch":
            content["adapter"] |= {"start_from": start, "train": way}
    content["training"] |= {"learning_rate": rate, "max_train_steps": steps, "channels_last": True}
    content["training"]["warmup_steps"] = min(content["training"]["warmup_steps"], steps // 4)
    content["checkpoint"] = {"every_steps": STEPS[0], "keep_every": STEPS[0], "keep": 1}
    return parse_config(content)


def scored(adapter: Any, condition: str, count: int, first_seed: int, steps: int) -> Mapping[str, Any]:
    """The scores of an adapter's images of test scenes."""
    scenes = load_test_scenes(count, first_seed=first_seed, condition_name=condition)
    return score_images(generate(load_base(), adapter, scenes, Sampling(steps)), scenes)


def t2i_adapter(condition: str, folder: Path) -> str:
    """The T2I-Adapter that is started from: the embedded one, or one that is trained here."""
    if condition == "canny":
        return str(weights_folder() / "canny" / "t2i")
    out = folder / "runs" / f"{condition}-{START}"
    with lock(folder / "locks" / out.name):
        return str(train_adapter(recipe(START, condition, 0, "", out, 1e-2, STEPS[-1])))


def choose_rates(folder: Path, store: Store) -> dict[str, float]:
    """The learning rate of each way that starts from the T2I-Adapter; scratch has the study's."""
    start, found = t2i_adapter("canny", folder), {"scratch": 1e-2}
    for way, rates in RATES.items():
        merits = {}
        for rate in rates:
            name = f"rates/{way}/{rate:g}"
            if not store.has(name):
                out = folder / "runs" / name.replace("/", "-")
                adapter = train_adapter(recipe(way, "canny", 0, start, out, rate, RATE_STEPS))
                store.add(name, scored(load_adapter(adapter), "canny", RATE_SCENES, RATE_SCENES_SEED, 20))
            values = store.read()
            merits[rate] = merit({m: float(values[f"{name}/{m}"].mean()) for m in METRICS})
        found[way] = max(merits, key=lambda rate: merits[rate])
    return found


def train_all(folder: Path, store: Store, conditions: list[str]) -> None:
    """Every training and its measurements, but those that another process has in hand."""
    rates = choose_rates(folder, store)
    for seed in SEEDS:  # the first seed of all maps comes first
        for condition in conditions:
            start = t2i_adapter(condition, folder)
            if not store.has(f"{condition}/{START}"):
                scores = scored(load_adapter(start), condition, SCENES, FIRST_SEED, 20)
                store.add(f"{condition}/{START}", scores)
            for way in WAYS:
                name = f"{condition}/{way}/{seed}"
                out = folder / "runs" / name.replace("/", "-")
                with lock(folder / "locks" / out.name, wait=False) as is_ours:
                    if is_ours and not all(store.has(f"{name}/{step}") for step in STEPS):
                        train_adapter(recipe(way, condition, seed, start, out, rates[way], STEPS[-1]))
                        measure(store, name, out, condition)


def measure(store: Store, name: str, out: Path, condition: str) -> None:
    """The scores of a run's adapter after each of `STEPS`."""
    for step in STEPS:
        if not store.has(f"{name}/{step}"):
            source = out / ADAPTER if step == STEPS[-1] else out / CHECKPOINTS / f"step-{step:08d}"
            store.add(f"{name}/{step}", scored(load_adapter(source), condition, SCENES, FIRST_SEED, 20))


def settings() -> dict[str, Any]:
    """What was trained and generated how."""
    return {
        "recipe": RECIPE.name,
        "hypothesis": HYPOTHESIS,
        "rates_tried": RATES,
        "rates_chosen_on": {"steps": RATE_STEPS, "scenes": RATE_SCENES, "first_seed": RATE_SCENES_SEED},
        "scenes": SCENES,
        "first_seed": FIRST_SEED,
        "sampling": {"steps": 20, "guidance_scale": Sampling().guidance_scale, "seed": Sampling().seed},
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", "canny")},
    }


def report(store: Store, out: Path) -> None:
    """Write the means of every measurement, the differences from the T2I-Adapter, and the plot."""
    scores = store.read()
    names = sorted({name.rpartition("/")[0] for name in scores})
    measured = {
        name: {metric: round(float(scores[f"{name}/{metric}"].mean()), 4) for metric in METRICS}
        for name in names
    }
    above = {
        f"{condition}/{way}/{step}": {
            metric: difference(scores, condition, way, step, metric)._asdict() for metric in METRICS
        }
        for condition, way, step in points(scores)
    }
    content = {"settings": settings(), "measured": measured, "minus_t2i": above} | machine_facts()
    write_whole(out / "from_t2i.json", json.dumps(content, indent=2) + "\n")
    with replacing(out / "from_t2i.webp") as file:
        figure(scores).savefig(file, format="webp", dpi=120, pil_kwargs={"lossless": True})


def points(scores: Scores) -> list[tuple[str, str, int]]:
    """(condition, way, step) of all that is measured from both seeds or the first."""
    return [
        (condition, way, step)
        for condition in CONDITIONS
        for way in WAYS
        for step in STEPS
        if f"{condition}/{way}/{SEEDS[0]}/{step}/{METRICS[0]}" in scores
    ]


def over_seeds(scores: Scores, condition: str, way: str, step: int, metric: str) -> np.ndarray:
    """Each image's score, the mean over the seeds that are measured."""
    keys = [f"{condition}/{way}/{seed}/{step}/{metric}" for seed in SEEDS]
    return np.mean([scores[key] for key in keys if key in scores], axis=0, dtype=np.float64)


def difference(scores: Scores, condition: str, way: str, step: int, metric: str) -> MeanInterval:
    """From the T2I-Adapter, image by image, with a 95 % interval."""
    own = over_seeds(scores, condition, way, step, metric)
    return bootstrap_mean(own - scores[f"{condition}/{START}/{metric}"])


def markdown_table(scores: Scores) -> str:
    """Colors and edge F1 in percent; in bold where they differ from the T2I-Adapter's."""
    lines = [["Map", "Start", "Steps", "Colors, %", "Edge F1, %", "Materials, %"]]
    metrics = ("binding_color", "edge_f1", "binding_material")
    for condition in CONDITIONS:
        measured = [point for point in points(scores) if point[0] == condition]
        if measured:
            values = [f"{100 * scores[f'{condition}/{START}/{metric}'].mean():.1f}" for metric in metrics]
            lines.append([condition, "T2I-Adapter", "0", *values])
        for _, way, step in measured:
            values = []
            for metric in metrics:
                apart = difference(scores, condition, way, step, metric)
                value = f"{100 * over_seeds(scores, condition, way, step, metric).mean():.1f}"
                values.append(f"**{value}**" if apart.low > 0 or apart.high < 0 else value)
            lines.append([condition, LABELS[way], f"{step:,}", *values])
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([table[0], "|---" * len(lines[0]) + "|", *table[1:]])


def figure(scores: Scores) -> Figure:
    """Colors and edge F1 over steps, a column for each map."""
    shown = list(dict.fromkeys(condition for condition, _, _ in points(scores)))
    made = Figure(figsize=(1 + 3.6 * len(shown), 5.6), layout="constrained")
    axes = made.subplots(2, len(shown), squeeze=False, sharex=True, sharey="row")
    for column, condition in enumerate(shown):
        for row, (metric, label) in enumerate((("binding_color", "colors, %"), ("edge_f1", "edge F1, %"))):
            axis, start = axes[row][column], 100 * scores[f"{condition}/{START}/{metric}"].mean()
            axis.axhline(start, color="gray", linestyle=":", label="T2I-Adapter")
            for way, color in zip(WAYS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
                steps = [step for at, each, step in points(scores) if (at, each) == (condition, way)]
                values = [100 * over_seeds(scores, condition, way, step, metric).mean() for step in steps]
                first = [] if way == "scratch" else [0]
                axis.plot(first + steps, [start] * len(first) + values, "o-", color=color, label=LABELS[way])
            axis.set(title=condition if row == 0 else "", ylabel=label if column == 0 else "")
            axis.grid(alpha=0.3)
        axes[1][column].set_xlabel("training steps")
    axes[1][0].legend(loc="lower right", fontsize="small")
    return made


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("rates", "train", "report"))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--folder", type=Path, default=cache_folder() / "from-t2i", help="of the trainings")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    store = Store(args.out / "from_t2i.npz", args.folder)
    if args.part == "rates":
        print(json.dumps(choose_rates(args.folder, store)))
    elif args.part == "train":
        train_all(args.folder, store, args.conditions)
    else:
        report(store, args.out)


if __name__ == "__main__":
    main()
