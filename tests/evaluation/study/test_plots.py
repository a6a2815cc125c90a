import numpy as np
import pytest

from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.evaluation.study.plan import OWN, Cell
from nexus_adapters.evaluation.study.plots import cost_figure, metrics_figure
from nexus_adapters.evaluation.study.results import CellResult


def result(value, **facts):
    return CellResult({}, facts, {OWN: Measured({"edge_f1": np.full(4, value)}, {})}, {})


@pytest.fixture
def results():
    return {
        Cell("canny", "base", 0): result(0.1),
        Cell("canny", "t2i", 0): result(0.5, parameters=1e6, gmacs=0.1),
        Cell("canny", "prime", 0): result(0.6, parameters=2e6, gmacs=0.2),
        Cell("canny", "prime", 1): result(0.8, parameters=2e6, gmacs=0.2),
        Cell("depth", "prime", 0): result(0.4, parameters=2e6, gmacs=0.2),
    }


def colors_at(panel, marker):
    return {line.get_color() for line in panel.lines if line.get_marker() == marker}


def test_costs_are_of_every_method_in_one_color(results):
    figure = cost_figure(results)
    weights, _, multiplications, _ = figure.axes
    dots = sorted(tuple(line.get_xydata()[0]) for line in weights.lines if line.get_marker() == "o")
    assert dots == [(1.0, 0.5), (2.0, pytest.approx(0.7))]
    assert {float(line.get_xdata()[0]) for line in multiplications.lines} == {0.1, 0.2}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["t2i", "prime"]
    of_depth = colors_at(figure.axes[1], "o")
    assert len(of_depth) == 1
    assert of_depth < colors_at(weights, "o")


def test_the_base_alone_costs_nothing(results):
    figure = cost_figure({Cell("canny", "base", 0): results[Cell("canny", "base", 0)]})
    assert not figure.axes[0].lines


def test_more_methods_take_more_room(results):
    lines = {Cell("canny", f"m{n}", 0): result(0.5, parameters=1e6) for n in range(12)}
    figure = metrics_figure(results | lines)
    canny, depth = (panel.get_position().height for panel in figure.axes)
    assert canny > 2 * depth
