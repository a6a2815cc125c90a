import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.metrics.normals import normal_angle_deg


def encoded(*vectors):
    """A map of one row, as normal maps are stored."""
    directions = np.array([vectors], float) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.rint((directions + 1) * 127.5).astype(np.uint8)


def test_is_the_angle_between_the_normals():
    angles = (0, 30, 90, 180)
    turned = [(np.sin(np.radians(a)), 0, np.cos(np.radians(a))) for a in angles]
    for angle, vector in zip(angles, turned, strict=True):
        found = normal_angle_deg(encoded(vector), encoded((0, 0, 1)))
        assert found == pytest.approx(angle, abs=1)  # 8 bits
    assert normal_angle_deg(encoded(*turned), encoded(*[(0, 0, 1)] * 4)) == pytest.approx(75, abs=0.5)


def test_lengths_do_not_count_and_equal_maps_have_no_angle():
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert normal_angle_deg(noise, noise) == pytest.approx(0, abs=1e-6)
    long, short = np.full((1, 1, 3), 255, np.uint8), np.full((1, 1, 3), 191, np.uint8)
    assert normal_angle_deg(long, short) == pytest.approx(0, abs=1e-6)


def test_other_input_is_refused():
    flat = np.zeros((4, 5, 3), np.uint8)
    with refused("normals", received="float64 (4, 5, 3)"):
        normal_angle_deg(flat.astype(float), flat)
    with refused("reference", received="uint8 (4, 5)"):
        normal_angle_deg(flat, flat[..., 0])
    with refused("reference", received="(3, 5, 3)", expected="(4, 5, 3)"):
        normal_angle_deg(flat, flat[:3])
