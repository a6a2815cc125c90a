"""The notebook runs from the first cell to the last, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(TOUR, as_version=4)


def test_the_notebook_has_no_outputs(notebook):
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.full
def test_the_notebook_runs(notebook, tmp_path):
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    tables = [output for output in outputs if "mine" in output.get("data", {}).get("text/markdown", "")]
    assert len(images) == 2
    assert len(tables) == 1
