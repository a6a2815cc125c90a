"""The committed results are of the committed plans, and the write-up shows them."""

import csv
import re
from importlib import import_module
from pathlib import Path

from nexus_adapters.study.plan import Study
from nexus_adapters.study.report import results_of
from nexus_adapters.study.tables import FIELDS, losses_csv, study_csv, study_markdown

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
    for name in ("study", "ablations", "blocks"):
        sections = re.split(r"^(?=#)", (RESULTS / f"{name}.md").read_text(), flags=re.MULTILINE)
        main = [section for section in sections if section.startswith("## ")]  # the views have a deeper head
        lines = [line for section in main for line in section.splitlines() if line.startswith("|")]
        assert lines
        assert not [line for line in lines if line not in shown]
    losses = csv.DictReader((RESULTS / "sweep.csv").read_text().splitlines())
    assert all(f"{float(row['val_loss_as_trained']):.4f}" in "\n".join(shown) for row in losses)


def test_the_blocks_table_is_made_of_the_committed_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    blocks = import_module("blocks")
    study = blocks.plan_of(tmp_path, quick=False)
    results = results_of(study)
    assert {path.stem for path in study.results.glob("*.json")} == {cell.name for cell in results}
    beside = blocks.of_the_study({cell.seed for cell in results})
    assert (RESULTS / "blocks.csv").read_text() == study_csv(beside | results)
    assert (RESULTS / "blocks.md").read_text() == study_markdown(study, beside | results)
