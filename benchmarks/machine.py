"""Describe the machine on which a benchmark runs, and write its result."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from nexus_adapters.bundled import BUNDLED
from nexus_adapters.files import write_text

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("nexus-adapters", "torch", "diffusers", "transformers", "numpy", "opencv-python-headless")


def machine_facts() -> dict[str, object]:
    """Return the current `machine` (processor, cores, torch's threads, memory, load) and `versions`."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            # If well above torch_threads, something else was running and the times mean little.
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    }


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run a miniature, only to test that it works")
    parser.add_argument("--out", type=Path, help=f"output folder (default: {RESULTS}, or none with --quick)")
    return parser


def report(
    name: str, args: argparse.Namespace, settings: Mapping[str, object], measured: Mapping[str, object]
) -> None:
    """Print settings, measured values and `machine_facts` as JSON; write them to `name`.json in `--out`."""
    text = json.dumps({"settings": settings, "measured": measured} | machine_facts(), indent=2) + "\n"
    print(text, end="")
    out = args.out or (None if args.quick else RESULTS)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{name}.json", text)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically and print its path."""
    write_text(path, text)
    print(f"wrote {path}")


def folder_hash(folder: Path, suffix: str = "") -> str:
    """Return the SHA-256 of names and contents of all files inside `folder` whose names end in `suffix`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def embedded_adapters(condition: str) -> dict[str, str]:
    """Return label in the results (name of the folder) -> name, for each embedded adapter of a condition.

    Prime and Slim, which have a residual connection, are "prime-residual" and "slim-residual" in the results.
    """
    return {Path(folder).name: name for name, folder in BUNDLED["embedded"].adapters[condition].items()}


def median_and_spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Return `median`, `low` and `high`; the middle half of the values is between `low` and `high`."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return round(ordered[below] + (place - below) * (ordered[above] - ordered[below]), digits)

    return {"median": quantile(0.5), "low": quantile(0.25), "high": quantile(0.75)}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
