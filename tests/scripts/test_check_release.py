"""What check_release deletes: the distributions of an earlier run, and nothing else."""

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("nexus_adapters-0.1.0-py3-none-any.whl", "nexus_adapters_embedded-0.1.0.tar.gz")


@pytest.fixture
def remove_earlier(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("check_release").remove_earlier


def test_distributions_of_an_earlier_run_are_deleted(remove_earlier, tmp_path):
    for name in OURS:
        (tmp_path / name).touch()
    remove_earlier(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_earlier(tmp_path / "new")


@pytest.mark.parametrize("other", ["notes.txt", "nexus_adapters.py", "nexus_adapters-notes.txt"])
def test_a_folder_with_other_files_is_left_alone(remove_earlier, tmp_path, other):
    for name in (*OURS, other):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=f"--out: .*{other}"):
        remove_earlier(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*OURS, other}


def test_a_folder_of_folders_is_left_alone(remove_earlier, tmp_path):
    """Such as src, whose folder has our name."""
    (tmp_path / OURS[0]).mkdir()
    with pytest.raises(SystemExit, match="--out: "):
        remove_earlier(tmp_path)
    with pytest.raises(SystemExit, match="--out: expected a folder"):
        remove_earlier(Path(__file__))
