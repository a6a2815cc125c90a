"""The test scenes with all that generating needs, and how well an image shows its scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from nexus_adapters.conditions import extract
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.render import Rendering, color_tone, material_shade, render
from nexus_adapters.embedded.scene import COLORS, MATERIALS, SIZE, Scene, SceneObject, Split, draw_scene
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.metrics.structure import edge_f1

_FULLY_VISIBLE = 0.99  # pixels shared with something else say nothing certain about either
_TONES = np.stack([color_tone(color) for color in COLORS]).astype(np.float64)
_CANDIDATES = tuple((color, material) for color in COLORS for material in MATERIALS)


@dataclass(frozen=True)
class SceneScore:
    """What of a scene an image shows: shares of its objects in [0, 1]; `background` is 1 if right, else 0."""

    binding_color: float
    binding_material: float
    background: float


def score(
    # `| np.ndarray`: under pytest, too, misshapen input is to meet the error below.
    image: UInt8[np.ndarray, "h w 3"] | np.ndarray,
    scene: Scene,
    rendering: Rendering | None = None,
) -> SceneScore:
    """Attribute binding and background of an 8-bit sRGB image that should show `scene`.

    Each object's visible region is compared with what the object would look like there in every color and
    material; the best fit (least squared error) is what the image shows. `rendering` saves rendering anew.

    Raises InvalidArgument unless the image is 8-bit and 128x128.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        expected = f"uint8 of shape {(SIZE, SIZE, 3)}"
        raise InvalidArgument("image", expected, f"{image.dtype} of shape {image.shape}")
    rendering = rendering or render(scene)
    pixels = image.astype(np.float32) / 255
    found = [
        best_fit(pixels, item, visible)
        for item, visible in zip(scene.objects, rendering.visible, strict=True)
    ]
    pairs = list(zip(found, scene.objects, strict=True))
    return SceneScore(
        binding_color=float(np.mean([color == item.color for (color, _), item in pairs])),
        binding_material=float(np.mean([material == item.material for (_, material), item in pairs])),
        background=float(background_color(pixels, rendering) == scene.background),
    )


def best_fit(
    pixels: Float[np.ndarray, "h w 3"], item: SceneObject, visible: Float[np.ndarray, "h w"]
) -> tuple[str, str]:
    """The (color, material) whose rendering of `item` is nearest to `pixels` ([0, 1]) where it is visible."""
    rows, columns = np.nonzero(visible > _FULLY_VISIBLE)
    seen = pixels[rows, columns]
    centers = (rows + np.float32(0.5), columns + np.float32(0.5))
    errors = np.empty((len(COLORS), len(MATERIALS)))
    for index, material in enumerate(MATERIALS):
        shade = material_shade(item, material, *centers).astype(np.float64)
        # The sum over pixels of |tone * shade - seen|^2, less |seen|^2, which is the same for all.
        errors[:, index] = np.square(_TONES).sum(axis=1) * (shade @ shade) - 2 * _TONES @ (shade @ seen)
    return _CANDIDATES[int(np.argmin(errors))]


def background_color(pixels: Float[np.ndarray, "h w 3"], rendering: Rendering) -> str:
    """The color word nearest to the background's mean; every word is tried at its best brightness."""
    mean = pixels[rendering.background_visible > _FULLY_VISIBLE].mean(axis=0)

    def error(color: str) -> float:
        tone = color_tone(color)
        brightness = np.clip(mean @ tone / (tone @ tone), 0.7, 1.14)  # the range that lights give
        return float(np.square(mean - brightness * tone).sum())

    return min(COLORS, key=error)


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
