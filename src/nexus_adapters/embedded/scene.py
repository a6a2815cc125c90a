"""Scenes of 2 to 4 objects on a lit background, sampled from a seed; all shapes, colors and materials."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Literal

from nexus_adapters.errors import InvalidArgument

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent")
MATERIALS = ("plain", "striped", "dotted", "checked")

# 8-bit sRGB. Any two of them are clearly different, and so are the dark tones of their patterns.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 36, 44),
    "orange": (246, 136, 26),
    "yellow": (246, 222, 52),
    "green": (46, 160, 68),
    "cyan": (66, 206, 222),
    "blue": (40, 76, 208),
    "purple": (138, 56, 186),
    "pink": (250, 152, 196),
}

Combination = tuple[str, str, str]
COMBINATIONS: tuple[Combination, ...] = tuple(product(SHAPES, COLORS, MATERIALS))


def _rank(combination: Combination) -> str:
    # A hash instead of a random generator gives the same choice in all library versions and on all machines.
    return hashlib.sha256(" ".join(combination).encode()).hexdigest()


# Held out of training: 26 of 256, about a tenth.
NOVEL_COMBINATIONS: frozenset[Combination] = frozenset(
    sorted(COMBINATIONS, key=_rank)[: round(len(COMBINATIONS) / 10)]
)

SIZE = 128  # side in pixels

Split = Literal["train", "test", "novel"]
SPLITS: tuple[Split, ...] = ("train", "test", "novel")

# Objects are smaller if there are more, so that all are visible: count -> circumscribed radius in pixels.
_RADIUS_RANGE = {2: (23.0, 36.0), 3: (20.0, 30.0), 4: (18.0, 26.0)}
_MARGIN = 2.0  # pixels between an object and the border
_MIN_DISTANCE = 0.62  # times the sum of two radii; a closer object would hide too much of the one behind


@dataclass(frozen=True)
class SceneObject:
    """An object. Position and radius are in pixels (x right, y down), rotation in radians, clockwise."""

    shape: str
    color: str
    material: str
    x: float
    y: float
    radius: float
    rotation: float


@dataclass(frozen=True)
class Scene:
    """Objects on a background of one color with a linear brightness gradient.

    Attributes:
        objects: the objects, from the farthest to the nearest.
        background: the background's color, one of `COLORS`.
        light_angle: direction of the light, in radians.
        light_strength: half the range of the background's brightness factor.
    """

    objects: tuple[SceneObject, ...]
    background: str
    light_angle: float
    light_strength: float


def draw_scene(seed: int, split: Split = "train") -> Scene:
    """Return the scene of a seed, which is the same in every process and on every machine.

    Args:
        seed: the seed, at least 0.
        split: "train" and "test" have the same distribution but different random numbers. In "novel" every
            object is one of `NOVEL_COMBINATIONS`, which never occur in the other two.

    Raises:
        InvalidArgument: for an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise InvalidArgument("split", f"one of {', '.join(SPLITS)}", repr(split))
    if seed < 0:
        raise InvalidArgument("seed", "an integer of at least 0", seed)
    # A string seed is hashed with SHA-512, which is stable, unlike `hash()`.
    rng = Random(f"nexus scene {split} {seed}")
    background = rng.choice(tuple(COLORS))
    attributes = _draw_attributes(rng, rng.choice((2, 3, 4)), background, novel=split == "novel")
    places = _draw_places(rng, len(attributes))
    objects = tuple(
        SceneObject(*combination, x, y, radius, rotation=rng.uniform(0, 2 * math.pi))
        for combination, (x, y, radius) in zip(attributes, places, strict=True)
    )
    return Scene(objects, background, rng.uniform(0, 2 * math.pi), rng.uniform(0.08, 0.22))


def _draw_attributes(rng: Random, count: int, background: str, novel: bool) -> list[Combination]:
    """Combinations with distinct shapes, so that a map shows which object in the caption is which."""
    drawn: list[Combination] = []
    while len(drawn) < count:
        combination = rng.choice(COMBINATIONS)
        shape, color, _ = combination
        fits = color != background and all(shape != other[0] for other in drawn)
        if fits and (combination in NOVEL_COMBINATIONS) == novel:
            drawn.append(combination)
    return drawn


def _draw_places(rng: Random, count: int) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each object, inside the frame and with so little overlap that each is visible."""
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(40):
            radius = rng.uniform(*_RADIUS_RANGE[count])
            low, high = radius + _MARGIN, SIZE - radius - _MARGIN
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            if all(math.dist((x, y), (u, v)) >= _MIN_DISTANCE * (radius + r) for u, v, r in places):
                places.append((x, y, radius))
                if len(places) == count:
                    return places
