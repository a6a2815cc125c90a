import json

import pytest
from tests.weights import write_tiny

from nexus_adapters import embedded
from nexus_adapters.cli import evaluate, main
from nexus_adapters.evaluation.estimates import LEAST_FOR_DISTANCES

FAST = ["--count", "3", "--steps", "2", "--batch-size", "3"]


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = write_tiny(tmp_path_factory.mktemp("weights"))
        patch.setattr(embedded, "WEIGHTS", folder)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run(*argv):
    return main(["evaluate", *map(str, argv)])


def failure(capsys, *argv):
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_it_draws_scores_and_prints_the_table(weights, tmp_path, capsys):
    out = tmp_path / "out"
    adapters = ["--adapter", weights / "canny" / "prime", "--adapter", "peer=t2i"]
    assert run(*adapters, "--out", out, "--prompts", "empty", *FAST) == 0
    shown = capsys.readouterr().out
    assert "no prompt; 2 steps, guidance scale 2, policy positive" in shown
    assert "| prime |" in shown
    assert "| peer |" in shown
    content = json.loads((out / "results.json").read_text())
    assert list(content["methods"]) == ["reference", "base", "prime", "peer"]
    assert content["methods"]["prime"]["adapter"].endswith("canny/prime")


def test_the_limit_of_distances_is_the_evaluators():
    assert evaluate._LEAST_FOR_DISTANCES == LEAST_FOR_DISTANCES


def test_scenes_are_judged_by_the_embedded_clip(tmp_path, capsys):
    assert run("--out", tmp_path / "out", "--count", 40, "--steps", 1, "--batch-size", 40) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"clip_score", "frechet", "mmd"} <= set(content["methods"]["base"]["metrics"])
    assert "frechet" not in content["methods"]["reference"]["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "prime", "--adapter", "x/prime"], "--adapter: expected names that differ: NAME=PATH"),
        (["--adapter", "a="], r"--adapter: expected [NAME=]PATH; received 'a='"),
        (["--kind", "folder"], "--data: expected a path, for kind folder; received none"),
        (["--steps", "0"], "--steps: expected a number greater than 0; received 0"),
        (["--policy", "all"], "--policy: expected 'positive', 'per_branch' or 'cond_only'; received 'all'"),
        (
            ["--noise-exponent", "-1"],
            "--noise-exponent: expected a number greater than or equal to 0; received -1",
        ),
        (["--count", "0"], "--count: expected at least 1, for kind scenes; received 0"),
        (["--resolution", "256"], "--resolution: expected 128, as scenes are drawn; received 256"),
        (["--condition", "pose"], "--condition: expected one of canny, depth, segmentation, sketch"),
        (["--split", "train"], "--split: expected test or novel, for kind scenes; received 'train'"),
        (["--judge", "model"], "--judge: expected KEY=VALUE; received 'model'"),
        (["--base", "no/where"], "--base: expected a Stable Diffusion pipeline, a folder or a Hub id"),
        (["--features", "prime"], "--features: expected at least 40 samples"),
    ],
)
def test_wrong_arguments_are_one_line_that_names_them(tmp_path, capsys, arguments, message):
    given = arguments if "--count" in arguments else [*arguments, "--count", "3"]
    assert message in failure(capsys, *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
