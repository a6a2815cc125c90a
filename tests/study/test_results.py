import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.estimates import Measured
from nexus_adapters.study.plan import Cell
from nexus_adapters.study.results import CellResult, load_result, load_results, save_result

CELL = Cell("canny", "prime", 3)
OTHER = Cell("depth", "t2i+fades", 0)
VIEWS = {
    "own": Measured(
        {"edge_f1": np.arange(5) / 8, "clip_score": np.arange(5) / 4 + 1},
        {"frechet": (1.5, np.array([1.0, 2.0])), "mmd": (0.1, np.array([0.5, 1 / 3]))},
    ),
    "empty": Measured({"edge_f1": np.array([0.75, np.nan])}, {}),
}
RESULT = CellResult({"a": 1}, {"parameters": 7.0}, VIEWS, {"machine": "here"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.npz"


def assert_equal(found, expected):
    assert (found.settings, found.facts, found.made_with) == (
        expected.settings,
        expected.facts,
        expected.made_with,
    )
    assert list(found.views) == list(expected.views)
    for view, measured in expected.views.items():
        assert list(found.views[view].scores) == list(measured.scores)
        for name, values in measured.scores.items():
            np.testing.assert_array_equal(found.views[view].scores[name], values)
        assert list(found.views[view].distances) == list(measured.distances)
        for name, (value, replicates) in measured.distances.items():
            assert found.views[view].distances[name][0] == value
            np.testing.assert_array_equal(found.views[view].distances[name][1], replicates)


def test_every_number_comes_back_under_its_own_name(path):
    save_result(path, CELL, RESULT)
    assert_equal(load_result(path, CELL), RESULT)


def test_without_a_file_there_are_no_results(path):
    assert load_results(path) == {}
    assert load_result(path, CELL) is None


def test_cells_are_added_and_replaced(path):
    losses = CellResult({}, {"val_loss": 0.5}, {}, {})
    save_result(path, CELL, RESULT)
    save_result(path, OTHER, losses)
    assert_equal(load_result(path, CELL), RESULT)
    assert_equal(load_result(path, OTHER), losses)
    save_result(path, CELL, replace(RESULT, facts={"parameters": 8.0}))
    assert load_result(path, CELL).facts == {"parameters": 8.0}
    assert set(load_results(path)) == {CELL.name, OTHER.name}


def test_the_same_results_are_the_same_bytes_in_any_order(tmp_path):
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file, cells in zip(files, ((CELL, OTHER), (OTHER, CELL)), strict=True):
        for cell in cells:
            save_result(file, cell, RESULT)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_arrays_are_read_without_pickle_by_cell_and_view(path):
    save_result(path, CELL, RESULT)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays[f"{CELL.name}/own/scores"].shape == (2, 5)
        assert arrays[f"{CELL.name}/own/distances"].tolist() == [[1.5, 1.0, 2.0], [0.1, 0.5, 1 / 3]]
        assert json.loads(bytes(arrays["cells"]))[CELL.name]["metrics"]["own"]["scores"] == [
            "edge_f1",
            "clip_score",
        ]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_another_kind_of_file_is_refused(path, content):
    path.write_bytes(content)
    with refused("results", f"'{path}'") as caught:
        load_results(path)
    assert "pickle" not in str(caught.value)


def test_a_file_that_is_damaged_anywhere_is_one_error_or_as_it_was(path):
    save_result(path, CELL, RESULT)
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with suppress(InvalidArgument):
                load_results(path)
        assert path.read_bytes() == damaged  # nothing is overwritten


@pytest.mark.parametrize("cells", [[], 3, {"a": 1}, {"a": {"metrics": []}}, {"a": {"metrics": {"own": {}}}}])
def test_an_archive_with_other_tables_is_refused(path, cells):
    np.savez(path, cells=np.frombuffer(json.dumps(cells).encode(), np.uint8))
    with refused("results", f"'{path}'", hint="Restore"):
        load_results(path)


def test_an_archive_of_something_else_is_refused(path):
    np.savez(path, scores=np.zeros(3))
    with refused("results", f"'{path}'"):
        load_results(path)


def write_as_before(folder, cell, result, names=True):
    """Two files per cell, as earlier versions kept them."""
    folder.mkdir(exist_ok=True)
    arrays, metrics = {}, {}
    for view, measured in result.views.items():
        arrays[f"{view}/scores"] = np.array(list(measured.scores.values()), np.float32)
        arrays[f"{view}/distances"] = np.array([[v, *each] for v, each in measured.distances.values()])
        metrics[view] = {"scores": list(measured.scores), "distances": list(measured.distances)}
    np.savez_compressed(folder / f"{cell.name}.npz", **arrays)
    about = {"settings": result.settings, "facts": result.facts, "made_with": result.made_with}
    about |= {"metrics": metrics} if names else {}
    (folder / f"{cell.name}.json").write_text(json.dumps(about))


def test_results_of_earlier_versions_are_read_and_taken_over(path):
    folder = path.with_suffix("")
    write_as_before(folder, CELL, RESULT)
    write_as_before(folder, Cell("canny", "t2i", 0), RESULT, names=False)  # still earlier: counts as absent
    (folder / "canny-base-1.json").write_text("{")  # damaged
    (folder / "canny-base-0.json").write_text("{}")  # a kill between the two files
    with pytest.warns(UserWarning, match="canny-base-1"):
        assert set(load_results(path)) == {CELL.name}
    assert_equal(load_result(path, CELL), RESULT)
    save_result(path, OTHER, RESULT)
    assert set(load_results(path)) == {CELL.name, OTHER.name}
    assert_equal(load_result(path, CELL), RESULT)
