"""Captions of scenes: a small grammar with several phrasings, and the spatial relations of the objects."""

from __future__ import annotations

import math
from random import Random

import numpy as np

from nexus_adapters.embedded.render import covered_pixels
from nexus_adapters.embedded.scene import Scene, SceneObject

_OPENINGS = ("", "", "a picture of ", "an image of ", "there is ")
_BACKGROUNDS = (
    "{opening}{objects} on {a} {color} background",
    "{opening}{objects}, on {a} {color} background",
    "{opening}{objects}. the background is {color}",
    "on {a} {color} background, {opening}{objects}",
)
_REACH = 1.15  # in radii; no outline extends farther from its center
_OVERLAP_PX = 8.0  # overlapping area; if it is smaller, it is not visible which object is nearer


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Describe a scene: every object with its color and material, how pairs are placed, and the background.

    Args:
        scene: the scene.
        phrasing: selects one of many wordings. The same scene and phrasing always give the same sentence.
    """
    objects = " ".join(f"{item.shape} {item.x:.2f} {item.y:.2f}" for item in scene.objects)
    rng = Random(f"caption {phrasing} {objects}")
    order = list(range(len(scene.objects)))
    rng.shuffle(order)
    described = _relations(scene, order, rng) if rng.random() < 0.6 else _listing(scene, order, rng)
    return rng.choice(_BACKGROUNDS).format(
        opening=rng.choice(_OPENINGS),
        objects=described,
        a=_article(scene.background),
        color=scene.background,
    )


def noun_phrase(item: SceneObject, rng: Random) -> str:
    """Return a phrase for an object, such as "a striped red star". The material "plain" is mostly omitted."""
    words = [item.material, item.color]
    if item.material == "plain" and rng.random() < 0.7:
        words = [item.color]
    elif rng.random() < 0.25:
        words.reverse()
    return " ".join([_article(words[0]), *words, item.shape])


def relation(scene: Scene, first: int, second: int) -> str:
    """Return the relation of object `first` to `second`: by depth if they overlap, else by side.

    `first` and `second` are indices of the objects, which are ordered from far to near.
    """
    a, b = scene.objects[first], scene.objects[second]
    dx, dy = a.x - b.x, a.y - b.y
    if overlap_px(a, b) >= _OVERLAP_PX:
        return "in front of" if first > second else "behind"
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def overlap_px(a: SceneObject, b: SceneObject) -> float:
    """Return the area in pixels that both objects cover."""
    if math.hypot(a.x - b.x, a.y - b.y) > _REACH * (a.radius + b.radius):
        return 0.0
    return float(np.minimum(covered_pixels(a), covered_pixels(b)).sum())


def _relations(scene: Scene, order: list[int], rng: Random) -> str:
    """Pairs joined by their relation, such as "A above B, and C behind D". A last odd object stands alone."""
    phrases = [noun_phrase(scene.objects[index], rng) for index in order]
    parts = [
        f"{phrases[i]} {relation(scene, order[i], order[i + 1])} {phrases[i + 1]}"
        for i in range(0, len(order) - 1, 2)
    ]
    if len(order) % 2:
        parts.append(phrases[-1])
    return ", and ".join(parts)


def _listing(scene: Scene, order: list[int], rng: Random) -> str:
    phrases = [noun_phrase(scene.objects[index], rng) for index in order]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
