import hashlib
from itertools import combinations, product

import numpy as np

from nexus_adapters.scenes.vocabulary import COLORS, COMBINATIONS, MATERIALS, NOVEL_COMBINATIONS, SHAPES


def test_enough_of_everything():
    assert len(SHAPES) == len(set(SHAPES)) == 8
    assert len(COLORS) == 8
    assert MATERIALS == ("plain", "striped", "dotted", "checked")
    assert set(COMBINATIONS) == set(product(SHAPES, COLORS, MATERIALS))
    assert len(COMBINATIONS) == 256


def test_one_combination_in_ten_is_novel():
    assert len(NOVEL_COMBINATIONS) == 26
    assert set(COMBINATIONS) > NOVEL_COMBINATIONS


def test_the_novel_combinations_never_change():
    """Weights were trained without them: another choice would make every reported figure wrong."""
    lines = "\n".join(sorted(" ".join(combination) for combination in NOVEL_COMBINATIONS))
    digest = "7975fd6d3bb76f93b1aefb141c2ee87d97754f4d90f139da339d3cb068e88b5c"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_only_the_combination_is_novel():
    """Every shape in every color, every shape in every material and so on are seen in training."""
    seen = set(COMBINATIONS) - NOVEL_COMBINATIONS
    for places in combinations(range(3), 2):
        pairs = {tuple(combination[place] for place in places) for combination in COMBINATIONS}
        assert {tuple(combination[place] for place in places) for combination in seen} == pairs


def test_colors_stay_apart_also_in_their_dark_tone():
    tones = [np.array(value) * share for value in COLORS.values() for share in (1, 0.45)]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in combinations(tones, 2))
    assert nearest > 25  # of 441, the length of the color cube's diagonal
    names = [np.array(value) for value in COLORS.values()]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(names, 2)) > 60
