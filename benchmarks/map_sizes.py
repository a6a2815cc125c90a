"""Measure how well the embedded Prime follows canny maps that are larger than the image.

    python benchmarks/map_sizes.py

Test scenes are rendered at 128, 256, 512 and 1024 pixels, a canny map is extracted from each, and images of
128 pixels are generated from the same noise with each map. Writes results/map_sizes.json: the mean edge F1
with the canny map of the true image, with 95 % intervals, and its paired difference to that of the 128-pixel
map. "as image" resizes maps like images, by averaging over areas, to show the benefit of the special resizing
of lines.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
from machine import benchmark_parser, folder_hash, report
from PIL import Image
from tqdm import tqdm

from nexus_adapters import Control, attach, load_adapter, load_base
from nexus_adapters.bases.families import base_of
from nexus_adapters.bundled import guidance_for, weights_folder
from nexus_adapters.choices import MapKind
from nexus_adapters.conditions import canny
from nexus_adapters.embedded import render as rendering
from nexus_adapters.embedded.held_out import TestScene, load_test_scenes, score_images
from nexus_adapters.embedded.scene import SIZE, Scene
from nexus_adapters.evaluation.generation import initial_latents
from nexus_adapters.metrics.intervals import bootstrap_mean

FIRST_SEED = 20_000  # as in balances.py
NOISE_SEED = 0
SIZES = (128, 256, 512, 1024)
BATCH = 12


def render_at(scene: Scene, side: int) -> Image.Image:
    """Render a scene at another size, equally sharp."""
    factor = side / SIZE
    objects = tuple(
        replace(item, x=item.x * factor, y=item.y * factor, radius=item.radius * factor)
        for item in scene.objects
    )
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) + 0.5
    constants = {
        "SIZE": side,
        "_ROWS": rows,
        "_COLUMNS": columns,
        "PATTERN_PERIOD": rendering.PATTERN_PERIOD * factor,
    }
    with patch.multiple(rendering, **constants):
        return Image.fromarray(rendering.render(replace(scene, objects=objects)).image)


def edge_f1(scenes: list[TestScene], maps: list[Image.Image], kind: MapKind, steps: int) -> np.ndarray:
    """Return the edge F1 of the images that Prime generates from these maps, one value per scene."""
    base, adapter = load_base(), load_adapter("prime")
    base.set_progress_bar_config(disable=True)
    known, _ = base_of(base)
    shape = (known.latent_channels, SIZE // known.pixels_per_latent, SIZE // known.pixels_per_latent)
    images: list[np.ndarray] = []
    for first in range(0, len(scenes), BATCH):
        part = slice(first, first + BATCH)
        with attach(base, Control(adapter, maps[part], kind=kind)):
            made = base(
                [scene.prompt for scene in scenes[part]],
                latents=initial_latents(len(scenes[part]), shape, NOISE_SEED, first),
                height=SIZE,
                width=SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance_for("embedded"),
            ).images
        images += [np.asarray(image) for image in made]
    return score_images(images, scenes)["edge_f1"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    args = parser.parse_args(arguments)
    count, steps, sizes = (2, 2, SIZES[:2]) if args.quick else (args.scenes, args.steps, SIZES)
    scenes = load_test_scenes(count, first_seed=FIRST_SEED)
    found: dict[str, np.ndarray] = {}
    cells: list[tuple[str, int, MapKind]] = [(str(side), side, "lines") for side in sizes]
    cells += [(f"{side} as image", side, "image") for side in sizes[1:]]
    for name, side, kind in tqdm(cells, unit="cell"):
        maps = [canny(render_at(scene.scene, side)) for scene in scenes]
        found[name] = edge_f1(scenes, maps, kind, steps)
    rows = {
        name: {
            "edge_f1": _interval(values),
            "less_that_of_128": _interval(values - found[str(SIZE)]),
        }
        for name, values in found.items()
    }
    settings = {
        "test_scenes": count,
        "first_seed": FIRST_SEED,
        "noise_seed": NOISE_SEED,
        "steps": steps,
        "guidance_scale": guidance_for("embedded"),
        "weights_sha256": {part: folder_hash(weights_folder() / part) for part in ("base", "canny")},
    }
    report("map_sizes", args, settings, {"rows": rows})


def _interval(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), map(float, bootstrap_mean(values)), strict=True))


if __name__ == "__main__":
    main()
