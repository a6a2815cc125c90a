"""Which training of each method comes with the package: chosen on test scenes that the results do not draw.

    nexus study benchmarks/plans/study.toml --out benchmarks/results
    python benchmarks/chosen.py ~/.cache/nexus-adapters/study/study/runs --install

Reads the adapters in RUNS/CONDITION-METHOD-SEED/adapter (or RUNS/CONDITION-METHOD-SEED), as the study leaves
them, draws 64 scenes from seed 10,000 on with each, as guidance.py does, and writes results/chosen.json:
every training's scores, and what follows from their merit, color binding plus edge F1, by rules that are the
same for all methods:

- `form`: of each variant, the form of the higher mean merit over its trainings on canny;
- `seed`: of each method on each condition, the training of the highest merit.

Of those that are in RUNS: results/chosen.json tells which. `--install` puts the chosen ones, in half
precision, into the package. Goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from canny import CODE, code_digest
from diffusers import T2IAdapter
from guidance import FIRST_SEED, merit
from machine import benchmark_parser, folder_hash, report, write_whole
from tqdm import tqdm

import nexus_adapters
from nexus_adapters import NexusAdapter, embedded
from nexus_adapters.data.user_cache import user_cache
from nexus_adapters.embedded import load_embedded_base
from nexus_adapters.evaluation.methods import Sampling, generate
from nexus_adapters.evaluation.scenes import load_test_scenes, score_images

# As the weights are stored -> the study's method.
TRAINED_AS = {
    "t2i": "t2i",
    "prime": "prime",
    "slim": "slim",
    "prime-residual": "prime+residual+heads8",
    "slim-residual": "slim+residual+heads8",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCENES, STEPS = 64, 20

# condition -> method -> seed -> metric -> mean
Merits = Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]


def find_trainings(runs: Path, condition: str, method: str) -> dict[int, Path]:
    """Seed -> the folder of its adapter."""
    pattern = re.compile(re.escape(f"{condition}-{TRAINED_AS[method]}-") + r"(\d+)")
    found = {}
    for folder in sorted(runs.glob(f"{condition}-*")):
        if match := pattern.fullmatch(folder.name):
            adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
            if (adapter / WEIGHTS).is_file():
                found[int(match[1])] = adapter
    return found


def load(method: str, folder: Path) -> NexusAdapter | T2IAdapter:
    """As it will come with the package: its weights rounded to half precision."""
    kind = T2IAdapter if method == "t2i" else NexusAdapter
    adapter: NexusAdapter | T2IAdapter = kind.from_pretrained(folder, local_files_only=True)
    return torch.nn.Module.float(torch.nn.Module.half(adapter))


def better_forms(merits: Merits) -> dict[str, str]:
    """Variant -> its form of the higher mean merit over the trainings on canny; the paper's of two equals."""

    def mean_merit(method: str) -> float:
        return mean(merit(scores) for scores in merits["canny"][method].values())

    return {
        variant: max((variant, f"{variant}-residual"), key=mean_merit) for variant in embedded.BETTER_FORM
    }


def best_seeds(merits: Merits) -> dict[str, dict[str, int]]:
    """Condition -> method -> the seed of the highest merit; the lower one of two equals."""
    return {
        condition: {
            method: max(sorted(by_seed), key=lambda seed: merit(by_seed[seed]))
            for method, by_seed in methods.items()
        }
        for condition, methods in merits.items()
    }


def install(method: str, source: Path, target: Path) -> None:
    """Put one adapter into the package, in half precision; what was there goes when the new one is whole."""
    partial, old = (target.with_name(f"{target.name}.{end}") for end in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    load(method, source).half().save_pretrained(partial, safe_serialization=True)
    config = json.loads((partial / "config.json").read_text())
    config.pop("_name_or_path", None)  # of this machine
    write_whole(partial / "config.json", json.dumps(config, indent=2) + "\n")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def find_all(runs: Path) -> dict[tuple[str, str, int], Path]:
    """(condition, method, seed) -> the folder of its adapter; ValueError where a method has none."""
    found: dict[tuple[str, str, int], Path] = {}
    lacking = []
    for condition, methods in embedded.METHODS.items():
        for method in methods:
            by_seed = find_trainings(runs, condition, method)
            found |= {(condition, method, seed): folder for seed, folder in by_seed.items()}
            if not by_seed:
                lacking.append(f"{condition}-{TRAINED_AS[method]}")
    if lacking:
        raise ValueError(f"RUNS: expected trainings of all methods; received none of {', '.join(lacking)}")
    return found


def measure(trainings: Mapping[tuple[str, str, int], Path], cache: Path, count: int, steps: int) -> Merits:
    """The scores of every training, from the cache where it has them."""
    base, sampling = load_embedded_base(), Sampling(steps)
    base_hash = folder_hash(embedded.WEIGHTS / "base")
    code_hash = {part: code_digest(Path(nexus_adapters.__file__).parent / part) for part in CODE}
    cache.mkdir(parents=True, exist_ok=True)
    merits: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for (condition, method, seed), folder in tqdm(trainings.items(), unit="training"):
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)
        told = [condition, base_hash, code_hash, weights_hash(folder), config, count, asdict(sampling)]
        known = cache / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
        if not known.is_file():
            scenes = load_test_scenes(count, first_seed=FIRST_SEED, condition=condition)
            images = generate(base, load(method, folder), scenes, sampling, show_progress=False)
            scores = {n: round(float(v.mean()), 4) for n, v in score_images(images, scenes).items()}
            write_whole(known, json.dumps(scores))
        merits.setdefault(condition, {}).setdefault(method, {})[seed] = json.loads(known.read_text())
    return merits


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights' file."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, and with `--install` replace the package's adapters."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a study's trainings")
    parser.add_argument("--install", action="store_true", help="put the chosen ones into the package")
    parser.add_argument("--cache", type=Path, default=user_cache() / "chosen", help="of what is measured")
    args = parser.parse_args(arguments)
    if args.quick and args.install:
        parser.error("--install: expected a whole measurement; received --quick")
    try:
        trainings = find_all(args.runs)
    except ValueError as error:
        parser.error(str(error))
    count, steps = (2, 2) if args.quick else (SCENES, STEPS)
    merits = measure(trainings, args.cache, count, steps)
    chosen = best_seeds(merits)
    if args.install:
        for condition, seeds in chosen.items():
            for method, seed in seeds.items():
                install(method, trainings[condition, method, seed], embedded.WEIGHTS / condition / method)
    hashes: dict[str, dict[str, dict[int, str]]] = {}
    for (condition, method, seed), folder in trainings.items():
        hashes.setdefault(condition, {}).setdefault(method, {})[seed] = weights_hash(folder)
    settings = {
        "trained_as": TRAINED_AS,
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "sampling": asdict(Sampling(steps)),
        "base_sha256": folder_hash(embedded.WEIGHTS / "base"),
        "trainings_sha256": hashes,
        "package_sha256": {
            condition: {method: folder_hash(embedded.WEIGHTS / condition / method) for method in methods}
            for condition, methods in embedded.METHODS.items()
        },
    }
    report("chosen", args, settings, {"scores": merits, "form": better_forms(merits), "seed": chosen})


if __name__ == "__main__":
    main()
