import math
from itertools import product

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.metrics.intervals import bootstrap_mean, jackknife_interval, jackknife_replicates


def test_is_the_middle_of_all_possible_resamples():
    """Four values have 256 equally likely resamples: their means can be counted out."""
    values = np.array([0.0, 0.1, 0.5, 1.0])
    means = np.sort([np.mean(drawn) for drawn in product(values, repeat=4)])
    for confidence in (0.5, 0.8, 0.95):
        found = bootstrap_mean(values, resamples=4000, confidence=confidence)
        for end, quantile in ((found.low, (1 - confidence) / 2), (found.high, (1 + confidence) / 2)):
            below, up_to = np.mean(means < end - 1e-9), np.mean(means <= end + 1e-9)
            assert below - 0.025 < quantile < up_to + 0.025


def test_is_as_wide_as_the_normal_theory_says():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == values.mean()
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(150):
        _, low, high = bootstrap_mean(rng.random(40), resamples=200, confidence=0.9)
        held += low <= 0.5 <= high
    assert 0.82 < held / 150 < 0.96  # 0.9, less the little that percentile intervals fall short of


def test_paired_differences_leave_out_what_is_common():
    rng = np.random.default_rng(3)
    scene = rng.normal(0, 1, 200)  # how hard each scene is, for both methods
    ours, theirs = scene + rng.normal(0.1, 0.05, 200), scene + rng.normal(0, 0.05, 200)
    difference = bootstrap_mean(ours - theirs)
    assert difference.low > 0
    assert difference.high - difference.low < 0.1 * (bootstrap_mean(ours).high - bootstrap_mean(ours).low)


def test_the_seed_settles_everything():
    values = np.random.default_rng(4).random(30)
    state = np.random.get_state()[1].copy()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)
    assert np.array_equal(np.random.get_state()[1], state)


def test_more_confidence_is_wider():
    values = np.random.default_rng(5).random(50)
    widths = [high - low for _, low, high in (bootstrap_mean(values, confidence=c) for c in (0.5, 0.9, 0.99))]
    assert widths == sorted(widths)


def test_equal_values_leave_no_doubt():
    assert bootstrap_mean(np.full(7, 0.25)) == (0.25, 0.25, 0.25)
    assert bootstrap_mean(np.array([2.0])) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "options", "name", "received"),
    [
        ([], {}, "values", "(0,)"),
        ([[1.0]], {}, "values", "(1, 1)"),
        ([0.0, math.nan], {}, "values", "nan"),
        ([0.0], {"resamples": 0}, "resamples", "0"),
        ([0.0], {"confidence": 1.0}, "confidence", "1.0"),
        ([0.0], {"confidence": math.nan}, "confidence", "nan"),
    ],
)
def test_bad_input_is_named(values, options, name, received):
    with refused(name, received):
        bootstrap_mean(np.array(values), **options)


def test_of_a_mean_with_groups_of_one_it_is_the_standard_error():
    values = np.random.default_rng(0).normal(size=40)
    one_each = np.array([np.delete(values, place).mean() for place in range(40)])
    found = jackknife_interval(float(values.mean()), one_each)
    error = values.std(ddof=1) / np.sqrt(40)
    assert found.high - found.mean == pytest.approx(1.959963984540054 * error, rel=1e-12)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_replicates_leave_out_one_group_each():
    left_out = jackknife_replicates(lambda kept: float(45 - kept.sum()), 10, groups=5)
    assert left_out.tolist() == [0 + 5, 1 + 6, 2 + 7, 3 + 8, 4 + 9]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        values = rng.exponential(size=200)
        replicates = jackknife_replicates(lambda kept, v=values: float(v[kept].mean()), 200)
        found = jackknife_interval(float(values.mean()), replicates)
        covered += found.low <= 1 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_misshapen_input_is_refused():
    with refused("groups", received="1", expected="at least 2"):
        jackknife_replicates(lambda kept: 0.0, 10, groups=1)
    with refused("count", received="39", expected="at least 40 samples for 20 groups"):
        jackknife_replicates(lambda kept: 0.0, 39)
    with refused("replicates", received="(1,)", expected="at least 2"):
        jackknife_interval(1.0, np.zeros(1))
    with refused("replicates", received="nan", expected="finite"):
        jackknife_interval(1.0, np.array([0.0, np.nan]))
