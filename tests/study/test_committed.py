"""The committed results are of the committed plans."""

from pathlib import Path

import pytest

from nexus_adapters.study.plan import Study
from nexus_adapters.study.results import load_results, results_of

PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"


@pytest.mark.parametrize("name", ["study", "ablations", "sweep"])
def test_every_committed_cell_is_planned_and_counts(name):
    study = Study(PLANS / f"{name}.toml")
    assert study.results.is_file()
    assert set(load_results(study.results)) == {cell.name for cell in results_of(study)}
