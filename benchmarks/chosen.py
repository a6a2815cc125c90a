"""Choose the training of each method to ship with the package, on test scenes that the results do not use.

    nexus study benchmarks/plans/study.toml --out benchmarks/results
    python benchmarks/chosen.py ~/.cache/nexus-adapters/study/study/runs --install

Reads the study's adapters in RUNS/CONDITION-METHOD-SEED/adapter (or RUNS/CONDITION-METHOD-SEED), generates 64
scenes starting at seed 10,000 with each, as guidance.py does, and writes results/chosen.json: the scores of
every training, and the choices by merit (color binding plus edge F1), with the same rules for all methods:

- `form`: for each variant, the form with the higher mean merit over its trainings on canny;
- `seed`: for each method and condition, the training with the highest merit.

results/chosen.json lists the trainings that were found in RUNS. `--install` copies the chosen ones into the
package in half precision. The same command resumes an interrupted run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from canny import CODE, code_digest
from guidance import FIRST_SEED, merit
from machine import benchmark_parser, embedded_adapters, folder_hash, report, write_whole
from tqdm import tqdm

import nexus_adapters
from nexus_adapters import InvalidArgument, load_adapter, load_base
from nexus_adapters.bundled import BUNDLED, weights_folder
from nexus_adapters.embedded.held_out import load_test_scenes, score_images
from nexus_adapters.evaluation.generation import Sampling, generate
from nexus_adapters.files import cache_folder, file_sha256, replacing_folder, write_json

# Folder of the package's weights -> the study's method.
TRAINED_AS = {
    "t2i": "t2i",
    "prime": "prime",
    "slim": "slim",
    "prime-residual": "prime+residual+heads8",
    "slim-residual": "slim+residual+heads8",
}
VARIANTS = ("prime", "slim")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCENES, STEPS = 64, 20

# condition -> method -> seed -> metric -> mean
Merits = Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]


def find_trainings(runs: Path, condition: str, method: str) -> dict[int, Path]:
    """Return seed -> the folder of its adapter."""
    pattern = re.compile(re.escape(f"{condition}-{TRAINED_AS[method]}-") + r"(\d+)")
    found = {}
    for folder in sorted(runs.glob(f"{condition}-*")):
        if match := pattern.fullmatch(folder.name):
            adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
            if (adapter / WEIGHTS).is_file():
                found[int(match[1])] = adapter
    return found


def load(folder: Path) -> Any:
    """Load an adapter with its weights rounded to half precision, as in the package."""
    return torch.nn.Module.float(load_adapter(folder, dtype=torch.float16))


def better_forms(merits: Merits) -> dict[str, str]:
    """Return variant -> the form with the higher mean merit over trainings on canny; the paper's if equal."""

    def mean_merit(method: str) -> float:
        return mean(merit(scores) for scores in merits["canny"][method].values())

    return {variant: max((variant, f"{variant}-residual"), key=mean_merit) for variant in VARIANTS}


def best_seeds(merits: Merits) -> dict[str, dict[str, int]]:
    """Return condition -> method -> the seed with the highest merit, or the lower of equal ones."""
    return {
        condition: {
            method: max(sorted(by_seed), key=lambda seed: merit(by_seed[seed]))
            for method, by_seed in methods.items()
        }
        for condition, methods in merits.items()
    }


def install(source: Path, target: Path) -> None:
    """Copy one adapter into the package, in half precision, replacing the existing one atomically."""
    with replacing_folder(target) as folder:
        load(source).half().save_pretrained(folder, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)  # a local path
        write_json(folder / "config.json", config, indent=2)
    print(f"wrote {target}")


def find_all(runs: Path) -> dict[tuple[str, str, int], Path]:
    """Return (condition, method, seed) -> folder of the adapter; `InvalidArgument` if a method has none."""
    found: dict[tuple[str, str, int], Path] = {}
    lacking = []
    for condition in BUNDLED["embedded"].adapters:
        for method in embedded_adapters(condition):
            by_seed = find_trainings(runs, condition, method)
            found |= {(condition, method, seed): folder for seed, folder in by_seed.items()}
            if not by_seed:
                lacking.append(f"{condition}-{TRAINED_AS[method]}")
    if lacking:
        raise InvalidArgument(
            "RUNS", "trainings of all methods", f"'{runs}', in which {', '.join(lacking)} are missing"
        )
    return found


def measure(trainings: Mapping[tuple[str, str, int], Path], cache: Path, count: int, steps: int) -> Merits:
    """Return the scores of every training, from the cache if they are there."""
    base, sampling = load_base(), Sampling(steps)
    base_hash = folder_hash(BUNDLED["embedded"].folder)
    code_hash = {part: code_digest(Path(nexus_adapters.__file__).parent / part) for part in CODE}
    cache.mkdir(parents=True, exist_ok=True)
    merits: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for (condition, method, seed), folder in tqdm(trainings.items(), unit="training"):
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)
        told = [condition, base_hash, code_hash, weights_hash(folder), config, count, asdict(sampling)]
        known = cache / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
        if not known.is_file():
            scenes = load_test_scenes(count, first_seed=FIRST_SEED, condition_name=condition)
            images = generate(base, load(folder), scenes, sampling, show_progress=False)
            scores = {n: round(float(v.mean()), 4) for n, v in score_images(images, scenes).items()}
            write_whole(known, json.dumps(scores))
        merits.setdefault(condition, {}).setdefault(method, {})[seed] = json.loads(known.read_text())
    return merits


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the weight file."""
    return file_sha256(folder / WEIGHTS)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the result, and with `--install` replace the package's adapters."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of a study's runs")
    parser.add_argument("--install", action="store_true", help="copy the chosen adapters into the package")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder() / "chosen", help="folder of measured scores"
    )
    args = parser.parse_args(arguments)
    if args.quick and args.install:
        parser.error(str(InvalidArgument("--install", "a full measurement", "--quick")))
    try:
        trainings = find_all(args.runs)
    except InvalidArgument as error:
        parser.error(str(error))
    count, steps = (2, 2) if args.quick else (SCENES, STEPS)
    merits = measure(trainings, args.cache, count, steps)
    chosen = best_seeds(merits)
    if args.install:
        for condition, seeds in chosen.items():
            for method, seed in seeds.items():
                install(trainings[condition, method, seed], weights_folder() / condition / method)
    hashes: dict[str, dict[str, dict[int, str]]] = {}
    for (condition, method, seed), folder in trainings.items():
        hashes.setdefault(condition, {}).setdefault(method, {})[seed] = weights_hash(folder)
    settings = {
        "trained_as": TRAINED_AS,
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "sampling": asdict(Sampling(steps)),
        "base_sha256": folder_hash(BUNDLED["embedded"].folder),
        "trainings_sha256": hashes,
        "package_sha256": {
            condition: {
                stored: folder_hash(weights_folder() / condition / stored)
                for stored in embedded_adapters(condition)
            }
            for condition in BUNDLED["embedded"].adapters
        },
    }
    report("chosen", args, settings, {"scores": merits, "form": better_forms(merits), "seed": chosen})


if __name__ == "__main__":
    main()
