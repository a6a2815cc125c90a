import numpy as np
import pytest

from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.study.plan import OWN, Cell
from nexus_adapters.study.results import CellResult
from nexus_adapters.study.tables import Row, best_method, rows_of

NOISE = np.random.default_rng(0).normal(0, 0.01, 50)


def row(method, **seeds):
    trainings = {
        int(seed.removeprefix("s")): Measured({"edge_f1": value + NOISE * (1 + number)}, {})
        for number, (seed, value) in enumerate(seeds.items())
    }
    return Row(method, 1e6, 0.1, trainings)


def test_the_best_method_is_that_of_the_seeds_that_both_have():
    few = row("few", s0=0.5)
    # Its mean is lower by a second training alone.
    many = row("many", s0=0.5, s1=0.3)
    assert many.measured.value("edge_f1") < few.measured.value("edge_f1") - 0.05
    assert best_method([few, many], "edge_f1") is None
    assert best_method([row("few", s0=0.6), many], "edge_f1") == "few"
    # From the same seed another is ahead.
    assert best_method([few, row("many", s0=0.6, s1=0.3)], "edge_f1") is None


def test_without_a_common_seed_none_is_best():
    assert best_method([row("a", s0=0.9), row("b", s1=0.1)], "edge_f1") is None


def test_the_base_is_compared_with_every_seed():
    assert best_method([row("base", s0=0.1), row("a", s1=0.9)], "edge_f1") == "a"
    assert best_method([row("base", s0=0.9), row("a", s1=0.1)], "edge_f1") == "base"


def test_one_method_alone_is_not_best():
    assert best_method([row("a", s0=0.9)], "edge_f1") is None


def test_a_row_has_the_methods_trainings_together():
    def result(value):
        return CellResult({}, {"parameters": 5.0}, {OWN: Measured({"edge_f1": np.full(3, value)}, {})}, {})

    results = {Cell("canny", "a", 0): result(0.2), Cell("canny", "a", 2): result(0.4)}
    results[Cell("depth", "a", 1)] = result(0.9)
    (found,) = rows_of(results, "canny", OWN)
    assert list(found.trainings) == [0, 2]
    assert (found.parameters, found.gmacs) == (5.0, 0.0)
    assert found.measured.value("edge_f1") == pytest.approx(0.3)
