"""Held-out scenes, which are never trained on, and scores of how well an image shows its scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from nexus_adapters.choices import CONDITION
from nexus_adapters.conditions import extract
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.render import Rendering, color_tone, material_shade, render
from nexus_adapters.embedded.scene import COLORS, MATERIALS, SIZE, Scene, SceneObject, Split, draw_scene
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.metrics.structure import edge_f1

# What `score_images` measures.
SCENE_METRICS = ("binding_color", "binding_material", "background", "edge_f1")

_FULLY_VISIBLE = 0.99  # fraction of a pixel; a pixel shared by two things is evidence for neither
_TONES = np.stack([color_tone(color) for color in COLORS]).astype(np.float64)
_CANDIDATES = tuple((color, material) for color in COLORS for material in MATERIALS)


@dataclass(frozen=True)
class TestScene:
    """A scene with the inputs for generation and the reference for scores.

    Attributes:
        scene: the scene.
        rendering: its true image, and which pixels show each object.
        condition: one of its structure maps: RGB, 128x128.
        prompt: its caption.
        condition_name: the kind of map, one of `embedded.maps.MAPS`.
    """

    __test__ = False  # despite its name, not a test case for pytest

    scene: Scene
    rendering: Rendering
    condition: Image.Image
    prompt: str
    condition_name: str = CONDITION


def load_test_scenes(
    count: int, split: Split = "test", first_seed: int = 0, condition_name: str = CONDITION
) -> list[TestScene]:
    """Return the held-out scenes of consecutive seeds. Training never sees the splits "test" and "novel".

    Args:
        count: number of scenes.
        split: "novel" has combinations of shape, color and material that training never sees.
        first_seed: seed of the first scene.
        condition_name: the kind of structure map, one of `embedded.maps.MAPS`.

    Raises:
        InvalidArgument: for an unknown split or `condition_name`, or a negative seed.
    """
    loaded = []
    for seed in range(first_seed, first_seed + count):
        scene = draw_scene(seed, split)
        rendering = render(scene)
        condition = draw_map(condition_name, scene, rendering)
        loaded.append(TestScene(scene, rendering, condition, caption(scene), condition_name))
    return loaded


def score_images(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], scenes: Sequence[TestScene]
) -> dict[str, Float[np.ndarray, " n"]]:
    """Score each image against its scene.

    Edges are compared to the canny map or, if the scene has another map, to the edges of its true image.

    Returns:
        For each metric of `SCENE_METRICS` a value per image, in [0, 1]; higher is better.
    """
    rows = []
    for image, expected in zip(images, scenes, strict=True):
        found = score(image, expected.scene, expected.rendering)
        edges = edge_f1(_edges(extract("canny", Image.fromarray(image))), _expected_edges(expected))
        rows.append((found.binding_color, found.binding_material, found.background, edges))
    return dict(zip(SCENE_METRICS, np.array(rows).T, strict=True))


@dataclass(frozen=True)
class SceneScore:
    """How much of a scene an image shows.

    Attributes:
        binding_color: fraction of objects that have the correct color (attribute binding), in [0, 1].
        binding_material: fraction of objects that have the correct material, in [0, 1].
        background: 1 if the background has the correct color, else 0.
    """

    binding_color: float
    binding_material: float
    background: float


def score(
    # `| np.ndarray` lets input with a wrong shape reach the error below, also under pytest.
    image: UInt8[np.ndarray, "h w 3"] | np.ndarray,
    scene: Scene,
    rendering: Rendering | None = None,
) -> SceneScore:
    """Score attribute binding and background of an image that should show `scene`.

    Each object's visible region is compared to what the object would look like in every color and material;
    the best fit (smallest squared error) is taken as what the image shows.

    Args:
        image: 8-bit sRGB image, 128x128.
        scene: what the image should show.
        rendering: the rendering of this scene, if you already have it.

    Raises:
        InvalidArgument: for an image with another dtype or shape.
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
    """Return the (color, material) in which `item` is nearest to `pixels`, in [0, 1], where it is visible."""
    rows, columns = np.nonzero(visible > _FULLY_VISIBLE)
    seen = pixels[rows, columns]
    centers = (rows + np.float32(0.5), columns + np.float32(0.5))
    errors = np.empty((len(COLORS), len(MATERIALS)))
    for index, material in enumerate(MATERIALS):
        shade = material_shade(item, material, *centers).astype(np.float64)
        # The sum over pixels of |tone * shade - seen|^2 without |seen|^2, which is the same for all.
        errors[:, index] = np.square(_TONES).sum(axis=1) * (shade @ shade) - 2 * _TONES @ (shade @ seen)
    return _CANDIDATES[int(np.argmin(errors))]


def background_color(pixels: Float[np.ndarray, "h w 3"], rendering: Rendering) -> str:
    """Return the color word nearest to the mean of the background, each compared at its best brightness."""
    mean = pixels[rendering.background_visible > _FULLY_VISIBLE].mean(axis=0)

    def error(color: str) -> float:
        tone = color_tone(color)
        brightness = np.clip(mean @ tone / (tone @ tone), 0.7, 1.14)  # the range of the lights' brightness
        return float(np.square(mean - brightness * tone).sum())

    return min(COLORS, key=error)


def _expected_edges(expected: TestScene) -> Bool[np.ndarray, "h w"]:
    if expected.condition_name == "canny":
        return _edges(expected.condition)
    return _edges(extract("canny", Image.fromarray(expected.rendering.image)))


def _edges(condition: Image.Image) -> Bool[np.ndarray, "h w"]:
    return np.asarray(condition)[..., 0] > 0
