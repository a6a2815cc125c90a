import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from nexus_adapters.data.prepare import near_duplicates
from nexus_adapters.data.prepare.near_duplicates import find_near_duplicates, perceptual_hash
from nexus_adapters.scenes.render import render
from nexus_adapters.scenes.scene import draw_scene


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
@pytest.mark.parametrize("seed", range(25))
def test_the_search_finds_what_comparing_all_finds(seed, chunk, monkeypatch):
    """Chains of neighbors above all, where one that goes makes room for the next."""
    monkeypatch.setattr(near_duplicates, "_CHUNK", chunk)
    monkeypatch.setattr(near_duplicates, "_ROWS", 7)
    draw = np.random.default_rng(seed)
    count, distance = int(draw.integers(1, 150)), int(draw.integers(0, 10))
    hashes = draw.integers(0, 2**64, 6, dtype=np.uint64)[draw.integers(0, 6, count)]
    for _ in range(draw.integers(0, 6)):
        flips = np.uint64(1) << draw.integers(0, 64, count).astype(np.uint64)
        hashes = hashes ^ (flips * draw.integers(0, 2, count).astype(np.uint64))
    has_hash = draw.random(count) < 0.9
    found = find_near_duplicates(hashes, has_hash, distance)
    assert found.tolist() == in_order(hashes, has_hash, distance).tolist()


def test_no_images_and_one():
    none = np.zeros(0, np.uint64)
    assert find_near_duplicates(none, none.astype(bool), 4).tolist() == []
    assert find_near_duplicates(np.array([2**64 - 1], np.uint64), np.array([True]), 4).tolist() == [-1]


def test_many_equal_images_leave_the_first():
    found = find_near_duplicates(np.full(5000, 2**64 - 1, np.uint64), np.ones(5000, bool), 4)
    assert found.tolist() == [-1] + [0] * 4999


def test_memory_is_at_most_32_bytes_an_image():
    count = 200_000
    hashes = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
    has_hash = np.ones(count, bool)
    tracemalloc.start()
    find_near_duplicates(hashes, has_hash, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (peak + hashes.nbytes + has_hash.nbytes) / count <= 32
