"""What README shows runs, in its order, and its figures are those that were measured."""

import csv
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from nexus_adapters.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    commands = [line for block in blocks("console") for line in block.splitlines() if line]
    for command in commands:
        assert command.startswith("$ nexus ")
        assert main(shlex.split(command.removeprefix("$ nexus "))) == 0
    drawn = list(tmp_path.glob("*.png"))
    assert len(drawn) >= 3
    assert all(Image.open(file).size == (128, 128) for file in drawn)


def test_the_table_is_the_measured_one():
    table = (ROOT / "benchmarks" / "results" / "canny.md").read_text()
    assert table in README


def measured(table, method, metric, policy="positive"):
    """(value, low, high) in %, as README writes them."""
    with (ROOT / "benchmarks" / "results" / table).open(newline="") as stream:
        (row,) = (
            row
            for row in csv.DictReader(stream)
            if (row["method"], row["policy"], row["metric"]) == (method, policy, metric)
        )
    return tuple(f"{100 * float(row[name]):.1f}" for name in ("value", "low", "high"))


def test_the_text_says_what_was_measured():
    text = " ".join(README.split())
    prime, slim = "prime+residual", "slim+residual"  # what the tables call them
    ahead = "Prime by {} points ({} to {}), Slim, with a sixth fewer parameters, by {} ({} to {})"
    colors = [measured("canny.csv", method, "binding_color_minus_t2i") for method in (prime, slim)]
    assert ahead.format(*colors[0], *colors[1]) in text
    for metric, start in (("binding_material", "Materials gain"), ("edge_f1", "edge F1")):
        gains = [measured("canny.csv", method, f"{metric}_minus_t2i")[0] for method in (prime, slim)]
        assert f"{start} {gains[0]} and {gains[1]}" in text
    lost = [
        measured("canny_text.csv", method, "binding_color_minus_own_prompt")[0].lstrip("-")
        for method in (prime, slim)
    ]
    assert f"Prime loses {lost[0]} points of the colors and Slim {lost[1]}" in text
    alone, per_branch = (
        measured("canny.csv", prime, "binding_color", policy)[0] for policy in ("positive", "per_branch")
    )
    assert f"{alone} % of the colors ({per_branch} % under `per_branch`)" in text
    assert f"edge F1 is {measured('canny.csv', prime, 'edge_f1')[0]} %" in text


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()
