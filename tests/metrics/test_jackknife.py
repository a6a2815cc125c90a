import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.metrics.jackknife import jackknife_interval, jackknife_replicates


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
