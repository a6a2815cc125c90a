import numpy as np
import pytest
import torch

from nexus_adapters.evaluation.estimates import Measured, best_beyond_doubt, distances, mean_of
from nexus_adapters.evaluation.report import head, in_order, rows_of
from nexus_adapters.metrics import METRICS, Metric, register_metric
from nexus_adapters.metrics.intervals import bootstrap_mean
from nexus_adapters.metrics.learned_features import frechet_distance

RNG = np.random.default_rng(0)
COMMON = RNG.normal(0.5, 0.3, 200)  # what makes a picture hard for all


def measured(shift, noise=0.02, seed=1, **distances_of):
    rng = np.random.default_rng(seed)
    scores = {"edge_f1": COMMON + shift + rng.normal(0, noise, 200)}
    return Measured(scores, distances_of)


def test_means_have_bootstrap_intervals():
    found = measured(0.0)
    expected = bootstrap_mean(found.scores["edge_f1"])
    estimate = found.estimate("edge_f1")
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (*expected, 200)
    assert found.value("edge_f1") == pytest.approx(estimate.value)
    assert found.metrics == ("edge_f1",)


def test_paired_differences_see_what_intervals_of_their_own_hide():
    first, second = measured(0.03), measured(0.0, seed=2)
    own = [each.estimate("edge_f1") for each in (first, second)]
    assert own[0].low < own[1].high  # they overlap
    difference = first.minus(second).estimate("edge_f1")
    assert difference.excludes_zero
    assert 0.02 < difference.low < difference.high < 0.04
    assert not first.minus(measured(0.03, seed=3)).estimate("edge_f1").excludes_zero


def test_the_best_is_named_only_where_nothing_else_may_be_as_good():
    three = {"a": measured(0.03), "b": measured(0.0, seed=2), "c": measured(-0.03, seed=3)}
    assert best_beyond_doubt(three, "edge_f1") == "a"
    assert best_beyond_doubt(three | {"d": measured(0.03, seed=4)}, "edge_f1") is None
    assert best_beyond_doubt({"a": three["a"]}, "edge_f1") is None
    assert best_beyond_doubt(three, "mmd") is None


def test_of_distances_the_lower_is_better():
    spread = np.linspace(-0.01, 0.01, 20)
    near, far = measured(0, frechet=(1.0, 1 + spread)), measured(0, frechet=(3.0, 3 + 2 * spread))
    assert best_beyond_doubt({"near": near, "far": far}, "frechet") == "near"
    difference = near.minus(far).estimate("frechet")
    assert difference.value == -2
    assert difference.high - difference.low == pytest.approx(
        near.estimate("frechet").high - near.estimate("frechet").low
    )


def test_several_trainings_become_one_by_their_mean():
    both = [
        Measured({"a": np.array([0.0, 1.0])}, {"mmd": (1.0, np.array([1.0, 2.0]))}),
        Measured({"a": np.array([1.0, 1.0])}, {"mmd": (3.0, np.array([3.0, 6.0]))}),
    ]
    found = mean_of(both)
    assert found.scores["a"].tolist() == [0.5, 1.0]
    assert found.distances["mmd"][0] == 2.0
    assert found.distances["mmd"][1].tolist() == [2.0, 4.0]


def test_distances_are_the_metrics_own_and_their_replicates_leave_pairs_out():
    rng = np.random.default_rng(5)
    drawn, true = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(60, 4)).astype(np.float32)
    found = distances(drawn, true)
    assert set(found) == {"frechet", "mmd"}
    value, replicates = found["frechet"]
    assert value == frechet_distance(torch.tensor(drawn), torch.tensor(true))
    kept = np.arange(60) % 20 != 3
    assert replicates[3] == frechet_distance(torch.tensor(drawn[kept]), torch.tensor(true[kept]))
    assert distances(drawn, drawn)["frechet"][0] == pytest.approx(0, abs=1e-9)


def test_registered_metrics_say_which_way_is_better_and_how_far_sets_lie_apart():
    with METRICS.temporary():
        register_metric(Metric("cost", better="lower"))
        register_metric(
            Metric("mean_apart", better="lower", distance=lambda a, b: float((a.mean() - b.mean()).abs()))
        )
        cheap, dear = (Measured({"cost": COMMON + shift}) for shift in (0.0, 1.0))
        assert best_beyond_doubt({"cheap": cheap, "dear": dear}, "cost") == "cheap"
        rows = np.random.default_rng(6).normal(size=(60, 4)).astype(np.float32)
        assert distances(rows + 1, rows)["mean_apart"][0] == pytest.approx(1, abs=1e-6)
        assert (head("cost"), head("mean_apart"), head("edge_f1")) == ("cost ↓", "mean apart ↓", "edge F1 ↑")
        assert in_order(["of_others", "cost", "mmd"]) == ["mmd", "cost", "of_others"]


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_samples_have_no_interval_and_no_best_method(count):
    """One sample's interval has no width, so that it would exclude zero whatever was measured."""
    good, bad = (Measured({"edge_f1": COMMON[:count] + shift}) for shift in (0.5, 0.0))
    estimate = good.minus(bad).estimate("edge_f1")
    assert (estimate.value, estimate.n) == (pytest.approx(0.5), count)
    assert estimate.low is estimate.high is estimate.interval is None
    assert not estimate.excludes_zero
    assert best_beyond_doubt({"good": good, "bad": bad}, "edge_f1") is None
    table = rows_of({"good": good, "bad": bad})
    assert [is_best for row in table.values() for _, is_best in row.values()] == [False, False]


def test_twenty_samples_have_an_interval_and_a_best_method():
    good, bad = (Measured({"edge_f1": COMMON[:20] + shift}) for shift in (0.5, 0.0))
    assert good.minus(bad).estimate("edge_f1").interval == pytest.approx((0.5, 0.5))
    assert best_beyond_doubt({"good": good, "bad": bad}, "edge_f1") == "good"
