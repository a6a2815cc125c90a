"""The test scenes with all that generating and scoring needs, and the scores of images of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from nexus_adapters.conditions import extract
from nexus_adapters.metrics.edges import edge_f1
from nexus_adapters.scenes.caption import caption
from nexus_adapters.scenes.maps import draw_map
from nexus_adapters.scenes.render import Rendering, render
from nexus_adapters.scenes.scene import Scene, Split, draw_scene
from nexus_adapters.scenes.score import score

METRICS = ("binding_color", "binding_material", "background", "edge_f1")


@dataclass(frozen=True)
class TestScene:
    """A scene, its rendering, its map as an image, its prompt, and which map it is."""

    __test__ = False  # pytest: not a test case

    scene: Scene
    rendering: Rendering
    condition: Image.Image
    prompt: str
    condition_name: str = "canny"


def load_test_scenes(
    count: int, split: Split = "test", first_seed: int = 0, condition: str = "canny"
) -> list[TestScene]:
    """The scenes of `count` seeds from `first_seed` on; training draws none of `test` and `novel`.

    `condition`: which of their maps, one of `scenes.maps.MAPS`; InvalidArgument for another.
    """
    loaded = []
    for seed in range(first_seed, first_seed + count):
        scene = draw_scene(seed, split)
        rendering = render(scene)
        drawn = draw_map(condition, scene, rendering)
        loaded.append(TestScene(scene, rendering, drawn, caption(scene), condition))
    return loaded


def initial_latents(count: int, shape: Sequence[int], seed: int, first: int = 0) -> Float[Tensor, "b c h w"]:
    """Standard normal noise of the rows from `first` on.

    Each row follows from (seed, row), so every method starts from the same.
    """
    rows = []
    for row in range(first, first + count):
        rows.append(torch.randn(tuple(shape), generator=row_generator(seed, row)))
    return torch.stack(rows)


def row_generator(seed: int, row: int) -> torch.Generator:
    """What all that is random about one picture is drawn from."""
    return torch.Generator().manual_seed(seed * 1_000_003 + row)


def score_images(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], scenes: Sequence[TestScene]
) -> dict[str, Float[np.ndarray, " n"]]:
    """Every metric of `METRICS` for each image against its scene, in [0, 1].

    Edges are compared with those of the canny map, or under another map with those of the scene's picture.
    """
    rows = []
    for image, expected in zip(images, scenes, strict=True):
        found = score(image, expected.scene, expected.rendering)
        edges = edge_f1(_edges(extract("canny", Image.fromarray(image))), _expected_edges(expected))
        rows.append((found.binding_color, found.binding_material, found.background, edges))
    return dict(zip(METRICS, np.array(rows).T, strict=True))


def _expected_edges(expected: TestScene) -> Bool[np.ndarray, "h w"]:
    if expected.condition_name == "canny":
        return _edges(expected.condition)
    return _edges(extract("canny", Image.fromarray(expected.rendering.image)))


def _edges(condition: Image.Image) -> Bool[np.ndarray, "h w"]:
    return np.asarray(condition)[..., 0] > 0
