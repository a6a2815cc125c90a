"""Under which circumstances a benchmark ran, and writing its result."""

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
    """`machine` (processor, cores, torch's threads, memory, load) and `versions`, as they are now."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            # Well above torch_threads: something else ran too, and the times are worth little.
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    }


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the timing benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a miniature, only to show that it runs")
    parser.add_argument("--out", type=Path, help=f"folder; by default {RESULTS}, and none with --quick")
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
    """Write the file, whole or not at all, and say so."""
    write_text(path, text)
    print(f"wrote {path}")


def folder_hash(folder: Path, suffix: str = "") -> str:
    """SHA-256 over names and contents of all files below `folder` whose names end in `suffix`."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def embedded_adapters(condition: str) -> dict[str, str]:
    """What the results call each embedded adapter of a condition, its folder's name, -> its name.

    Prime and Slim have a residual connection; in the results that is "prime-residual" and "slim-residual".
    """
    return {Path(folder).name: name for name, folder in BUNDLED["embedded"].adapters[condition].items()}


def median_and_spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """`median`, and `low` and `high`: the middle half of the values lies between them."""
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
