"""The checker of generated tables, on documents of its own. That the committed ones agree is its own task."""

from importlib import import_module
from pathlib import Path

import pytest

TABLE = "| a | b |\n|---|---|\n| 1 | 2 |"
DOCUMENT = f"# Title\n\n<!-- generated: tables/one.md -->\n{TABLE}\n<!-- end generated -->\n\nText.\n"


@pytest.fixture
def checker(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return import_module("check_results")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.md"
    path.write_text(DOCUMENT)
    return path


def test_a_block_that_agrees_is_no_problem(checker, document):
    assert checker.check_document(document, {"tables/one.md": TABLE + "\n"}.__getitem__) == []


def test_a_block_that_differs_is_one_problem_that_names_the_line(checker, document):
    render = {"tables/one.md": TABLE.replace("2", "3")}.__getitem__
    (problem,) = checker.check_document(document, render)
    assert f"{document}:3: tables/one.md" in problem
    assert "line 6" in problem
    assert document.read_text() == DOCUMENT


@pytest.mark.parametrize("table", [TABLE + "\n| 3 | 4 |", TABLE.rpartition("\n")[0]])
def test_more_and_fewer_rows_are_problems_and_are_written(checker, document, table):
    render = {"tables/one.md": table}.__getitem__
    assert len(checker.check_document(document, render)) == 1
    assert checker.check_document(document, render, write=True) == []
    assert document.read_text() == DOCUMENT.replace(TABLE, table)
    assert checker.check_document(document, render) == []


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("content", [DOCUMENT, DOCUMENT.replace("<!-- end generated -->\n", "")])
def test_unknown_tables_and_open_blocks_are_problems_and_stay(checker, document, content, write):
    document.write_text(content)
    (problem,) = checker.check_document(document, {}.__getitem__, write=write)
    assert f"{document}:3" in problem
    assert document.read_text() == content


def test_every_block_of_a_document_is_checked(checker, document):
    document.write_text(DOCUMENT + DOCUMENT.replace("one", "two"))
    render = {"tables/one.md": TABLE, "tables/two.md": "| c |"}.__getitem__
    (problem,) = checker.check_document(document, render)
    assert "tables/two.md" in problem


def test_a_block_does_not_end_at_the_end_of_the_next_one(checker, document):
    document.write_text(DOCUMENT.replace("<!-- end generated -->\n", "") + DOCUMENT)
    before = document.read_text()
    (problem,) = checker.check_document(document, {"tables/one.md": TABLE}.__getitem__, write=True)
    assert f"{document}:3" in problem
    assert document.read_text() == before


def test_a_section_of_a_file_is_a_table(checker, monkeypatch, tmp_path):
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    (tmp_path / "all.md").write_text(
        f"## canny\n\n{TABLE}\n\n### canny, empty\n\n| x |\n\n## depth\n\n| y |\n"
    )
    assert checker.table_of("all.md#canny").strip() == TABLE
    assert checker.table_of("all.md#depth").strip() == "| y |"
    with pytest.raises(KeyError):
        checker.table_of("all.md#sketch")


def test_files_are_compared_whole(checker, tmp_path):
    file = tmp_path / "table.csv"
    (problem,) = checker.check_text(file, "a\n")
    assert str(file) in problem
    assert checker.check_text(file, "a\n", write=True) == []
    assert file.read_text() == "a\n"
    assert checker.check_text(file, "a\n") == []
