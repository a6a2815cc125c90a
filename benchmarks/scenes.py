"""Measure the speed of the embedded world on one core: sampling, rendering, maps, captions and scoring.

    python benchmarks/scenes.py

Every part runs over the same scenes in one thread. Times are wall-clock times and CPU times, which exclude
other load on the machine. The targets are 300 scenes per second for sampling, rendering and canny, and 100
with all four maps. Writes results/scenes.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cv2
from machine import benchmark_parser, report
from PIL import Image

from nexus_adapters.conditions import extract
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import score
from nexus_adapters.embedded.maps import MAPS, draw_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import draw_scene


def timed(part: Callable[[Any], Any], items: list[Any]) -> tuple[list[Any], dict[str, float]]:
    """Return a part's results and its milliseconds per item."""
    wall, processor = time.perf_counter(), time.process_time()
    results = [part(item) for item in items]
    spent = {"wall_ms": time.perf_counter() - wall, "cpu_ms": time.process_time() - processor}
    return results, {name: round(1000 * seconds / len(items), 4) for name, seconds in spent.items()}


def measure(count: int) -> dict[str, object]:
    """Return milliseconds per scene for every part, and scenes per second for what each sample needs."""
    parts: dict[str, dict[str, float]] = {}
    scenes, parts["draw"] = timed(draw_scene, list(range(count)))
    rendered, parts["render"] = timed(render, scenes)
    _, parts["canny"] = timed(lambda r: extract("canny", Image.fromarray(r.image)), rendered)
    _, parts["caption"] = timed(caption, scenes)
    pairs = list(zip(scenes, rendered, strict=True))
    for name in MAPS:
        if name != "canny":
            _, parts[name] = timed(lambda pair, name=name: draw_map(name, *pair), pairs)
    _, parts["score"] = timed(lambda pair: score(pair[1].image, *pair), pairs)
    rates: dict[str, float] = {}
    for name, maps in {"draw_render_canny": ("canny",), "draw_render_all_maps": MAPS}.items():
        for clock, unit in {"wall_ms": "s", "cpu_ms": "cpu_s"}.items():
            together = sum(parts[part][clock] for part in ("draw", "render", *maps))
            rates[f"{name}_scenes_per_{unit}"] = round(1000 / together, 1)
    return parts | rates


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args(arguments)
    count = min(args.scenes, 20) if args.quick else args.scenes
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    measure(10)  # the first ones also fill caches
    measured = measure(count)
    cv2.setNumThreads(threads)
    report("scenes", args, {"scenes": count, "opencv_threads": 1}, measured)


if __name__ == "__main__":
    main()
