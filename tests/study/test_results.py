import json

import numpy as np

from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.study.plan import Cell
from nexus_adapters.study.results import CellResult, load_result, save_result

CELL = Cell("canny", "prime", 3)


def test_every_number_comes_back_under_its_own_name(tmp_path):
    views = {
        "own": Measured(
            {"edge_f1": np.arange(5) / 8, "clip_score": np.arange(5) / 4 + 1},
            {"frechet": (1.5, np.array([1.0, 2.0])), "mmd": (0.25, np.array([0.5, 0.125]))},
        ),
        "empty": Measured({"edge_f1": np.array([0.75, np.nan])}, {}),
    }
    save_result(tmp_path, CELL, CellResult({"a": 1}, {"parameters": 7.0}, views, {"machine": "here"}))
    found = load_result(tmp_path, CELL)
    assert (found.settings, found.facts, found.made_with) == (
        {"a": 1},
        {"parameters": 7.0},
        {"machine": "here"},
    )
    assert list(found.views) == ["own", "empty"]
    for view, measured in views.items():
        assert list(found.views[view].scores) == list(measured.scores)
        for name, values in measured.scores.items():
            np.testing.assert_array_equal(found.views[view].scores[name], values)
        assert list(found.views[view].distances) == list(measured.distances)
        for name, (value, replicates) in measured.distances.items():
            assert found.views[view].distances[name][0] == value
            np.testing.assert_array_equal(found.views[view].distances[name][1], replicates)


def test_a_result_without_views_comes_back(tmp_path):
    save_result(tmp_path, CELL, CellResult({}, {"val_loss": 0.5}, {}, {}))
    assert load_result(tmp_path, CELL).facts == {"val_loss": 0.5}


def test_what_an_earlier_version_wrote_counts_as_not_there(tmp_path):
    save_result(tmp_path, CELL, CellResult({}, {}, {}, {}))
    written = tmp_path / f"{CELL.name}.json"
    told = json.loads(written.read_text())
    del told["metrics"]
    written.write_text(json.dumps(told))
    assert load_result(tmp_path, CELL) is None
