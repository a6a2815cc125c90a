"""Measure the overhead of `nexus prepare`, the speedup with a second process, and the memory it needs.

    python benchmarks/prepare.py

First, photos of 512x512 pixels are made. Each round processes them in three ways: with a bare loop that
decodes, extracts canny maps, encodes and writes a tar with the same libraries (OpenCV with one thread), with
the local engine in one process, and in two. Memory is the peak resident set of a process that prepares a
slice of a simulated source of a million samples, after its first and its last sample, and that of the search
for near-duplicates among a million hashes. Writes results/prepare.json.

The targets are an overhead of at most 20 %, 1.7 times the speed with two processes, and 32 bytes per sample.
"""

from __future__ import annotations

import io
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import Sample
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.prepare.engines import run_local
from nexus_adapters.prepare.filters import find_near_duplicates
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.run import prepare

SIDE = 512
MILLION = 1_000_000


def write_photos(folder: Path, count: int) -> None:
    """Write scenes with camera noise as JPEGs of quality 90, with captions."""
    source, rng = SceneSource(count), np.random.default_rng(0)
    for index in range(count):
        sample = source.load(index)
        pixels = np.asarray(sample.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:05d}.jpg", quality=90)
        (folder / f"{index:05d}.txt").write_text(sample.captions[0])


def bare_loop(folder: Path, out: Path) -> None:
    """Do only the work itself, with the libraries that the engine uses."""
    with tarfile.open(out, "w") as tar:
        for path in sorted(folder.glob("*.jpg")):
            caption = path.with_suffix(".txt").read_bytes()
            with Image.open(path) as file:
                image = file.convert("RGB")
            edges = cv2.Canny(np.asarray(image), 100, 200)
            members = {
                "jpg": saved(image, format="JPEG", quality=95, subsampling="4:4:4"),
                "canny.png": saved(Image.fromarray(edges).convert("1"), format="PNG", compress_level=4),
                "txt": caption,
            }
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{path.stem}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return the bytes of an image's file."""
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def measure_speed(count: int, rounds: int) -> dict[str, object]:
    """Return the seconds of each way in every round, and their ratios within the rounds."""
    seconds: dict[str, list[float]] = {"bare_loop": [], "one_process": [], "two_processes": []}
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as place:
        photos = Path(place) / "photos"
        photos.mkdir()
        write_photos(photos, count)
        for number in range(rounds):
            plan = Plan(FolderSource(photos), {"canny": {}}, shard_size=max(1, count // 16))
            ways = {
                "bare_loop": partial(bare_loop, photos, Path(place) / f"{number}.tar"),
                "one_process": partial(
                    prepare, plan, Path(place) / f"{number}-1", partial(run_local, workers=1)
                ),
                "two_processes": partial(
                    prepare, plan, Path(place) / f"{number}-2", partial(run_local, workers=2)
                ),
            }
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
    over = [one / bare - 1 for one, bare in zip(seconds["one_process"], seconds["bare_loop"], strict=True)]
    gain = [one / two for one, two in zip(seconds["one_process"], seconds["two_processes"], strict=True)]
    return {
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "photos_per_s": round(count / statistics.median(seconds["one_process"]), 1),
        "overhead_over_bare_loop": [round(value, 4) for value in over],
        "overhead_over_bare_loop_median": round(statistics.median(over), 4),
        "speed_of_two_processes": [round(value, 3) for value in gain],
        "speed_of_two_processes_median": round(statistics.median(gain), 3),
    }


class SimulatedSource:
    """A million images that are generated on demand."""

    def __len__(self) -> int:
        return MILLION

    def key(self, index: int) -> str:
        """Return its index as text."""
        return f"picture {index}"

    def load(self, index: int) -> Sample:
        """Return an image of one color."""
        color = (index % 256, index // 256 % 256, index // 65536)
        return Sample(self.key(index), Image.new("RGB", (64, 64), color), None, (f"color {color}",))


def memory_of_a_slice(count: int) -> None:
    """Print this process's peak resident set, in KiB, after a tenth of the slice and after all of it."""
    source: Any = SimulatedSource()
    with tempfile.TemporaryDirectory() as place:
        for part in (count // 10, count):
            plan = Plan(source, {"canny": {}}, count=part, shard_size=500)
            prepare(plan, Path(place) / str(part), partial(run_local, workers=1))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def measure_memory(count: int, hashes: int) -> dict[str, object]:
    """Return the memory of a slice in a separate process and of the search for near-duplicates."""
    ran = subprocess.run(
        [sys.executable, __file__, "--slice", str(count)], capture_output=True, text=True, check=True
    )
    first, last = map(int, ran.stdout.split())
    drawn = np.random.default_rng(0).integers(0, 2**64, hashes, dtype=np.uint64)
    has_hash = np.ones(hashes, bool)
    tracemalloc.start()
    start = time.perf_counter()
    find_near_duplicates(drawn, has_hash, 4)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] + drawn.nbytes + has_hash.nbytes
    tracemalloc.stop()
    return {
        "slice_of_a_million": count,
        "peak_memory_mib_after_a_tenth": round(first / 1024, 1),
        "peak_memory_mib_after_all": round(last / 1024, 1),
        "growth_bytes_a_sample": round((last - first) * 1024 / (count * 0.9), 2),
        "near_duplicates_hashes": hashes,
        "near_duplicates_bytes_a_sample": round(peak / hashes, 2),
        "near_duplicates_s": round(seconds, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    from machine import benchmark_parser, report  # slow to import, which every process would repeat

    parser = benchmark_parser(__doc__)
    parser.add_argument("--photos", type=int, default=3200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slice", type=int, help="only measure memory, in this process")
    args = parser.parse_args(arguments)
    if args.slice is not None:
        memory_of_a_slice(args.slice)
        return
    count, rounds = (16, 1) if args.quick else (args.photos, args.rounds)
    pictures, hashes = (200, 2000) if args.quick else (50_000, MILLION)
    measured = measure_speed(count, rounds) | measure_memory(pictures, hashes)
    settings = {"photos": count, "side": SIDE, "rounds": rounds, "conditions": ["canny"], "opencv_threads": 1}
    report("prepare", args, settings, measured)


if __name__ == "__main__":
    main()
