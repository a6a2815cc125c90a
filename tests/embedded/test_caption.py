"""Captions are read back by an independent reader and held against the geometry."""

import re
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import COLORS, MATERIALS, SHAPES, SPLITS, Scene, SceneObject, draw_scene

COLOR, MATERIAL, SHAPE = ("|".join(words) for words in (COLORS, MATERIALS, SHAPES))
OBJECT = re.compile(rf"\b(an?) (?:({MATERIAL}) )?({COLOR})(?: ({MATERIAL}))? ({SHAPE})\b")
GROUND = re.compile(rf"\bon an? ({COLOR}) background|\bthe background is ({COLOR})$")
RELATIONS = ("in front of", "behind", "to the left of", "to the right of", "above", "below")
SIDES = {"to the left of", "to the right of"}
PHRASINGS = range(12)
SCENES = [draw_scene(seed, split) for split in SPLITS for seed in range(30)]


def objects_of(sentence):
    """[(shape, color, material or None, where the phrase begins and ends)]"""
    return [
        (m.group(5), m.group(3), m.group(2) or m.group(4), m.start(), m.end())
        for m in OBJECT.finditer(sentence)
    ]


def relations_of(sentence):
    """[(shape, relation, shape)]"""
    found = objects_of(sentence)
    pairs = [(a, sentence[a[-1] : b[-2]].strip(), b) for a, b in pairwise(found)]
    return [(a[0], words, b[0]) for a, words, b in pairs if words in RELATIONS]


@cache
def every_sentence():
    return [(scene, caption(scene, phrasing)) for scene in SCENES for phrasing in PHRASINGS]


def test_every_object_is_named_once_with_color_and_material():
    for scene, sentence in every_sentence():
        named = {(shape, color, material or "plain") for shape, color, material, _, _ in objects_of(sentence)}
        assert named == {(item.shape, item.color, item.material) for item in scene.objects}, sentence
        assert len(objects_of(sentence)) == len(scene.objects), sentence


def test_the_background_is_named_once():
    for scene, sentence in every_sentence():
        grounds = [match.group(1) or match.group(2) for match in GROUND.finditer(sentence)]
        assert grounds == [scene.background], sentence


def test_a_plain_object_may_go_without_its_material():
    words = Counter(material for _, s in every_sentence() for _, _, material, _, _ in objects_of(s))
    assert words[None] > words["plain"] > 0


def test_relations_hold_in_the_picture():
    told = Counter()
    for scene, sentence in every_sentence():
        places = {item.shape: index for index, item in enumerate(scene.objects)}
        for first, relation, second in relations_of(sentence):
            told[relation] += 1
            assert holds(scene, places[first], relation, places[second]), sentence
    assert set(told) == set(RELATIONS)
    assert min(told.values()) > 20


def holds(scene, first, relation, second):
    a, b = scene.objects[first], scene.objects[second]
    if relation in ("in front of", "behind"):
        far, near = sorted((first, second))
        return (first == near) == (relation == "in front of") and hidden_px(scene, far, near) > 1
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation.startswith("to the") else (dy, dx)
    return abs(along) >= abs(across) and (along < 0) == (relation in ("to the left of", "above"))


@cache
def hidden_px(scene, far, near):
    """How much of the farther object comes to light where the nearer one is taken away."""

    def shown(*items):
        alone = Scene(items, scene.background, scene.light_angle, scene.light_strength)
        return float(render(alone).visible[0].sum())

    return shown(scene.objects[far]) - shown(scene.objects[far], scene.objects[near])


def test_some_sentences_list_and_some_relate():
    share = np.mean([bool(relations_of(sentence)) for _, sentence in every_sentence()])
    assert 0.4 < share < 0.8


def test_phrasings_differ_and_repeat_exactly():
    for scene in SCENES[::9]:
        sentences = [caption(scene, phrasing) for phrasing in range(30)]
        assert len(set(sentences)) >= 10
        assert sentences == [caption(scene, phrasing) for phrasing in range(30)]
        assert sentences[0] == caption(scene)


def test_the_order_of_the_words_is_free():
    first = Counter(objects_of(sentence)[0][0] for sentence in (caption(SCENES[0], p) for p in range(40)))
    assert set(first) == {item.shape for item in SCENES[0].objects}


def test_few_words_are_enough():
    words = {word for _, sentence in every_sentence() for word in re.findall(r"\w+|[^\w\s]", sentence)}
    assert {*COLORS, *MATERIALS, *SHAPES} < words
    assert len(words) <= 41
    assert all(re.fullmatch(r"[a-z]+|[.,]", word) for word in words)


def test_never_longer_than_clip_reads():
    """CLIP reads 77 tokens, two of them special; a word is one, or two where it is rare."""
    tokens = [len(re.findall(r"\w+|[^\w\s]", sentence)) for _, sentence in every_sentence()]
    assert max(tokens) <= 36
    assert 2 * max(tokens) + 2 <= 77


def test_articles():
    sentences = [sentence for _, sentence in every_sentence()]
    assert any(" an orange " in sentence for sentence in sentences)
    for sentence in sentences:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence), sentence


@pytest.mark.parametrize(("gap", "expected"), [(-3, {"in front of", "behind"}), (3, SIDES)])
def test_depth_is_named_only_where_it_is_visible(gap, expected):
    """A circle and, to its right, a square: with a gap of 3 pixels only their frames overlap."""
    circle = SceneObject("circle", "red", "plain", x=40, y=64, radius=24, rotation=0)
    x = circle.x + 0.92 * circle.radius + gap + 24 / 2**0.5
    square = SceneObject("square", "pink", "plain", x, y=64, radius=24, rotation=0)
    scene = Scene((circle, square), "blue", light_angle=0, light_strength=0.1)
    told = {relation for p in range(30) for _, relation, _ in relations_of(caption(scene, p))}
    assert told == expected
