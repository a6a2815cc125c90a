"""What a scene is made of: the shapes, colors and materials, and which combinations training never sees."""

from __future__ import annotations

import hashlib
from itertools import product

SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent")
MATERIALS = ("plain", "striped", "dotted", "checked")

# 8-bit sRGB. Chosen so that the nearest two, and the nearest two of their dark halves, stay clearly apart.
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
    # A hash, not a random generator: the same choice under every library version and machine.
    return hashlib.sha256(" ".join(combination).encode()).hexdigest()


# One in ten: 26 of 256.
NOVEL_COMBINATIONS: frozenset[Combination] = frozenset(
    sorted(COMBINATIONS, key=_rank)[: round(len(COMBINATIONS) / 10)]
)
