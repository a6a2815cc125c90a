import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.metrics.edges import edge_f1


def brute_force(predicted, reference, tolerance):
    """The definition, pixel by pixel."""
    ours, theirs = np.argwhere(predicted).tolist(), np.argwhere(reference).tolist()
    if not ours or not theirs:
        return float(not ours and not theirs)

    def matched(points, others):
        return sum(
            any(max(abs(row - r), abs(column - c)) <= tolerance for r, c in others) for row, column in points
        )

    precision, recall = matched(ours, theirs) / len(ours), matched(theirs, ours) / len(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def random_maps(seed, shape=(9, 13), share=0.06):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < share, rng.random(shape) < share


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5])
def test_is_the_definition(tolerance):
    found = []
    for seed in range(12):
        predicted, reference = random_maps(seed)
        found.append(edge_f1(predicted, reference, tolerance))
        assert found[-1] == pytest.approx(brute_force(predicted, reference, tolerance), abs=1e-12)
        assert found[-1] == edge_f1(reference, predicted, tolerance)
    assert len(set(found)) > 2  # the maps differ enough to tell anything


def test_pixels_count_not_edges():
    reference = np.zeros((5, 20), bool)
    reference[1, :10] = True
    predicted = np.zeros((5, 20), bool)
    predicted[2, :20] = True  # eleven of twenty lie within a pixel of the reference
    assert edge_f1(predicted, reference) == pytest.approx(2 * 0.55 / 1.55)


def test_the_tolerance_is_one_pixel_unless_given():
    reference, one_off, two_off = np.zeros((3, 16, 16), bool)
    reference[4, 4:12] = one_off[5, 5:13] = two_off[6, 4:12] = True  # one is a diagonal step away
    assert edge_f1(one_off, reference) == 1
    assert edge_f1(two_off, reference) == 0
    assert edge_f1(two_off, reference, tolerance_px=2) == 1
    assert edge_f1(one_off, reference, tolerance_px=0) == 0


def test_nothing_matches_across_the_border():
    predicted, reference = np.zeros((2, 6, 6), bool)
    predicted[0, 0] = reference[5, 5] = True
    assert edge_f1(predicted, reference, tolerance_px=4) == 0
    assert edge_f1(predicted, reference, tolerance_px=5) == 1


@pytest.mark.parametrize("shape", [(4, 4), (0, 3)])
def test_two_empty_maps_agree(shape):
    assert edge_f1(np.zeros(shape, bool), np.zeros(shape, bool)) == 1.0


def test_one_empty_map_does_not():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert edge_f1(empty, full) == edge_f1(full, empty) == 0.0


def test_the_maps_stay_as_they_are():
    predicted, reference = random_maps(0)
    copies = predicted.copy(), reference.copy()
    edge_f1(predicted, reference)
    assert np.array_equal(predicted, copies[0])
    assert np.array_equal(reference, copies[1])


FLAT = np.zeros((4, 4), bool)


@pytest.mark.parametrize(
    ("predicted", "reference", "tolerance", "name", "expected", "received"),
    [
        (FLAT.astype(np.uint8), FLAT, 1, "predicted", "bool", "uint8 (4, 4)"),
        (FLAT, FLAT[None], 1, "reference", "(H, W)", "bool (1, 4, 4)"),
        (FLAT, FLAT[:3], 1, "reference", "(4, 4)", "(3, 4)"),
        (FLAT, FLAT, -1, "tolerance_px", "at least 0", "-1"),
    ],
)
def test_bad_maps_are_named(predicted, reference, tolerance, name, expected, received):
    with refused(name, received, expected=expected):
        edge_f1(predicted, reference, tolerance)
