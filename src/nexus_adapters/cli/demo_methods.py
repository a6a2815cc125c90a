"""The demo's methods, and their images: each from the same noise."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from nexus_adapters.bases.source import EMBEDDED, load_base
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.cli.demo_scenes import SCENE_SEEDS
from nexus_adapters.evaluation.methods import Images, Sampling, generate
from nexus_adapters.evaluation.scenes import METRICS, TestScene, score_images
from nexus_adapters.methods import load_adapter

_METHODS = {"base": None, "t2i": "t2i", "slim": "slim", "prime": "prime"}


@dataclass(frozen=True)
class Method:
    """A way to generate. `adapter_name` is the embedded adapter's; None, like the adapter, for the base."""

    name: str
    adapter_name: str | None
    adapter: Any

    @property
    def parameters(self) -> int:
        """Number of the adapter's weights."""
        return 0 if self.adapter is None else sum(weight.numel() for weight in self.adapter.parameters())


@dataclass(frozen=True)
class Result:
    """A method's images of `scenes` (prompt by prompt, each over all maps) and their scores in [0, 1]."""

    method: Method
    scenes: Sequence[TestScene]
    images: Images
    scores: dict[str, Float[np.ndarray, " n"]]
    noise_rows: Sequence[int]
    generation_s: float

    def mean_scores(self) -> dict[str, float]:
        """Every metric's mean over the images."""
        return {name: round(float(values.mean()), 4) for name, values in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each image, for JSON."""
        return [
            {
                "method": self.method.name,
                "scene_seed": SCENE_SEEDS[noise_row],
                "prompt": scene.prompt,
                "objects": len(scene.scene.objects),
                "noise_row": noise_row,
                **{name: round(float(self.scores[name][index]), 4) for name in METRICS},
            }
            for index, (scene, noise_row) in enumerate(zip(self.scenes, self.noise_rows, strict=True))
        ]


def sampling_of(steps: int, guidance: float | None, seed: int) -> Sampling:
    """How to sample; without `guidance`, with the one that suits the embedded base."""
    scale = BUNDLED[EMBEDDED].guidance_scale if guidance is None else guidance
    return Sampling(steps=steps, guidance_scale=scale, seed=seed)


def load_methods(condition: str = "canny") -> tuple[Any, list[Method]]:
    """The embedded base; and as methods the base alone, T2I-Adapter (where there is one), Slim and Prime."""
    there = BUNDLED[EMBEDDED].adapters[condition]
    methods = [
        Method(name, adapter, None if adapter is None else load_adapter(adapter, condition))
        for name, adapter in _METHODS.items()
        if adapter is None or adapter in there
    ]
    return load_base(EMBEDDED), methods


def generate_all(
    base: Any,
    methods: Sequence[Method],
    maps: Sequence[Sequence[TestScene]],
    sampling: Sampling,
) -> list[Result]:
    """Every method's images, and their scores. `maps`: for each map, its scene in several colors.

    The noise depends on the map alone, so from prompt to prompt the words are all that changes.
    """
    by_prompt = list(zip(*maps, strict=True))
    scenes = [scene for row in by_prompt for scene in row]
    results = []
    with tqdm(total=len(methods) * len(by_prompt), unit="batch") as bar:
        for method in methods:
            bar.set_description(method.name)
            started_s = time.perf_counter()
            images: Images = []
            for row in by_prompt:
                images += generate(base, method.adapter, row, sampling, show_progress=False)
                bar.update()
            generation_s = time.perf_counter() - started_s
            noise_rows = [number for _ in by_prompt for number in range(len(maps))]
            scores = score_images(images, scenes)
            results.append(Result(method, scenes, images, scores, noise_rows, generation_s))
    return results
