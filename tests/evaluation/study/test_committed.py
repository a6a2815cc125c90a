"""The committed results are of the committed plans, and the write-up shows them."""

import csv
from pathlib import Path

from nexus_adapters.evaluation.study.plan import Study
from nexus_adapters.evaluation.study.report import results_of
from nexus_adapters.evaluation.study.tables import FIELDS, losses_csv, study_csv, study_markdown

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def test_every_row_is_a_planned_cells():
    cells = Study(ROOT / "benchmarks" / "plans" / "study.toml").cells()
    planned = {(cell.method, cell.condition, str(cell.seed)) for cell in cells}
    rows = list(csv.DictReader((RESULTS / "study.csv").read_text().splitlines()))
    assert tuple(rows[0]) == FIELDS
    assert {(row["method"], row["condition"], row["seed"]) for row in rows} <= planned
    for row in rows:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        assert int(row["n"]) > 0


def test_the_tables_are_made_of_the_committed_results():
    for name in ("study", "ablations", "sweep"):
        study = Study(ROOT / "benchmarks" / "plans" / f"{name}.toml")
        results = results_of(study)
        assert {path.stem for path in study.results.glob("*.json")} == {cell.name for cell in results}
        table = study_csv(results) if study.views() else losses_csv(results)
        assert (RESULTS / f"{name}.csv").read_text() == table
        assert len(table.splitlines()) > len(results) > 0
        if study.views():
            assert (RESULTS / f"{name}.md").read_text() == study_markdown(study, results)


def test_the_write_up_has_the_measured_tables():
    shown = (ROOT / "docs" / "study.md").read_text().splitlines()
    lines = (RESULTS / "study.md").read_text().splitlines()
    lines += (RESULTS / "ablations.md").read_text().partition("###")[0].splitlines()
    missing = [line for line in lines if line.startswith("|") and line not in shown]
    assert not missing
    losses = csv.DictReader((RESULTS / "sweep.csv").read_text().splitlines())
    assert all(f"{float(row['val_loss_as_trained']):.4f}" in "\n".join(shown) for row in losses)
