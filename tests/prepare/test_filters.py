import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from tests.data.image_files import picture
from tests.refusals import refused

from nexus_adapters.data.samples import Sample
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.prepare.filters import Filters, LeftOut, find_near_duplicates, perceptual_hash


def scene(seed):
    return Image.fromarray(render(draw_scene(seed)).image)


def bits_between(a, b):
    return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()


def test_hashes_follow_what_is_shown():
    image = scene(0)
    assert bits_between(image, image) == 0
    changed = [
        image.resize((300, 300)),
        image.resize((64, 64)),
        ImageEnhance.Brightness(image).enhance(1.1),
        image.convert("L"),
    ]
    assert max(bits_between(image, other) for other in changed) <= 4
    apart = [bits_between(scene(a), scene(b)) for a in range(12) for b in range(a)]
    assert min(apart) > 4
    assert 20 < np.mean(apart) < 40


def in_order(hashes, has_hash, distance):
    """What is meant, one image after the other."""
    kept, nearest = [], np.full(len(hashes), -1)
    for index in np.flatnonzero(has_hash):
        near = [other for other in kept if int(hashes[index] ^ hashes[other]).bit_count() <= distance]
        if near:
            nearest[index] = near[0]
        else:
            kept.append(index)
    return nearest


@pytest.mark.parametrize("chunk", [5, 2**16])
@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 25))]
)
def test_the_search_finds_what_comparing_all_finds(seed, chunk):
    """Chains of neighbors above all, where one that goes makes room for the next."""
    draw = np.random.default_rng(seed)
    count, distance = int(draw.integers(1, 150)), int(draw.integers(0, 10))
    hashes = draw.integers(0, 2**64, 6, dtype=np.uint64)[draw.integers(0, 6, count)]
    for _ in range(draw.integers(0, 6)):
        flips = np.uint64(1) << draw.integers(0, 64, count).astype(np.uint64)
        hashes = hashes ^ (flips * draw.integers(0, 2, count).astype(np.uint64))
    has_hash = draw.random(count) < 0.9
    found = find_near_duplicates(hashes, has_hash, distance, chunk=chunk, rows=7)
    assert found.tolist() == in_order(hashes, has_hash, distance).tolist()


def test_no_images_and_one():
    none = np.zeros(0, np.uint64)
    assert find_near_duplicates(none, none.astype(bool), 4).tolist() == []
    assert find_near_duplicates(np.array([2**64 - 1], np.uint64), np.array([True]), 4).tolist() == [-1]


def test_many_equal_images_leave_the_first():
    found = find_near_duplicates(np.full(1500, 2**64 - 1, np.uint64), np.ones(1500, bool), 4)
    assert found.tolist() == [-1] + [0] * 1499


@pytest.mark.parametrize("count", [20_000, pytest.param(200_000, marks=pytest.mark.full)])
def test_memory_is_at_most_32_bytes_an_image(count):
    hashes = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    has_hash = np.ones(count, bool)
    tracemalloc.start()
    find_near_duplicates(hashes, has_hash, 2, chunk=count // 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (peak + hashes.nbytes + has_hash.nbytes) / count <= 32


def sample(width=40, height=20, captions=("a red star",)):
    return Sample("key", picture(0, width, height), None, captions)


def test_nothing_is_left_out_unless_asked_for():
    odd = sample(1, 300, ("",))
    assert Filters().apply(odd) is not None
    assert Filters().apply(odd).captions == ("",)


@pytest.mark.parametrize(
    ("filters", "kept", "left_out", "kind", "reason"),
    [
        (Filters(min_side=20), sample(), sample(40, 19), "small", "sides of at least 20, got 40x19"),
        (
            Filters(max_aspect=2),
            sample(),
            sample(41, 20),
            "aspect",
            "an aspect ratio of at most 2, got 41x20",
        ),
        (Filters(max_aspect=2), sample(20, 40), sample(20, 41), "aspect", "at most 2, got 20x41"),
        (
            Filters(min_caption_length=10),
            sample(),
            sample(captions=("a star", "")),
            "caption",
            "a caption with at least 10 characters, got 6, 0",
        ),
        (
            Filters(min_caption_length=2, max_caption_length=10),
            sample(),
            sample(captions=("a", "eleven char")),
            "caption",
            "a caption with 2 to 10 characters, got 1, 11",
        ),
    ],
)
def test_limits_are_kept_and_told(filters, kept, left_out, kind, reason):
    assert filters.apply(kept).image is kept.image
    with pytest.raises(LeftOut, match=reason) as caught:
        filters.apply(left_out)
    assert caught.value.kind == kind


def test_of_several_captions_those_that_pass_are_kept():
    several = sample(captions=("a", "a red star", "a very long caption indeed"))
    assert Filters(min_caption_length=5, max_caption_length=12).apply(several).captions == ("a red star",)


@pytest.mark.parametrize(
    ("limits", "name", "received", "expected"),
    [
        ({"min_side": -1}, "min_side", -1, "at least 0"),
        ({"max_aspect": 0.5}, "max_aspect", 0.5, "0 or a finite number of at least 1"),
        ({"max_aspect": float("nan")}, "max_aspect", "nan", "finite"),
        ({"min_caption_length": -2}, "min_caption_length", -2, "at least 0"),
        ({"min_caption_length": 9, "max_caption_length": 8}, "max_caption_length", 8, "9"),
        ({"near_duplicates": 16}, "near_duplicates", 16, "0 to 15"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, name, received, expected):
    with refused(name, received, expected=expected):
        Filters(**limits)
