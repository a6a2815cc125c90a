import json
import re

import pytest
from tests.weights import use_weights, write_tiny

from nexus_adapters.cli import evaluate, main
from nexus_adapters.evaluation.estimates import LEAST_FOR_DISTANCES

FAST = ["--count", "3", "--steps", "2", "--batch-size", "3"]


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = write_tiny(tmp_path_factory.mktemp("weights"))
        use_weights(patch, folder)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def run(*argv):
    return main(["evaluate", *map(str, argv)])


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


def test_guidance_has_the_name_that_it_has_in_other_commands(tmp_path):
    """And the one that it had."""
    for name in ("--guidance", "--guidance-scale"):
        assert run("--out", tmp_path / name, name, "3", "--count", 1, "--steps", 1) == 0
        content = json.loads((tmp_path / name / "results.json").read_text())
        assert content["settings"]["guidance_scale"] == 3


@pytest.mark.parametrize(
    ("arguments", "name", "shown"),
    [
        (["--adapter", "prime", "--adapter", "x/prime"], "--adapter", "'prime' twice"),
        (["--adapter", "a="], "--adapter", "'a='"),
        (["--adapter", "nothing"], "--adapter", "'nothing'"),
        (["--adapter", "a=no/where"], "--adapter", "'no/where'"),
        (["--adapter", "base=prime"], "--adapter", "'base'"),
        (["--adapter", "t2i", "--condition", "depth"], "--adapter", "prime, slim for depth"),
        (["--kind", "folder"], "--data", ""),
        (["--kind", "scenes", "--data", "x"], "--data", "'x'"),
        (["--data", "no/where"], "--data", "'no/where'"),
        (["--kind", "tars", "--data", "no/where.tar"], "--data", "no/where.tar"),
        (["--steps", "0"], "--steps", "got 0"),
        (["--policy", "all"], "--policy", "'positive', 'per_branch' or 'cond_only', got 'all'"),
        (["--noise-exponent", "-1"], "--noise-exponent", "got -1"),
        (["--guidance", "-1"], "--guidance", "got -1"),
        (["--guidance-scale", "nan"], "--guidance", "nan"),
        (["--scale", "-1"], "--scale", "got -1"),
        (["--seed", "-1"], "--seed", "got -1"),
        (["--batch-size", "0"], "--batch-size", "got 0"),
        (["--first", "-1"], "--first", "got -1"),
        (["--dtype", "int8"], "--dtype", "'int8'"),
        (["--count", "0"], "--count", "got 0"),
        (["--resolution", "256"], "--resolution", "got 256"),
        (["--condition", "pose"], "--condition", "canny, depth, segmentation, sketch"),
        (["--split", "train"], "--split", "'train'"),
        (["--image-column", "a"], "--image-column", "'a'"),
        (["--judge", "model"], "--judge", "'model'"),
        (["--option", "low"], "--option", "'low'"),
        (["--option", "lo=3"], "--option", "'lo'"),
        (["--judge", "low=x"], "--judge low", "'x'"),
        (["--base", "no/where"], "--base", "'no/where'"),
        (["--base", "nowhere"], "--base", "'nowhere'"),
        (["--base-config", "x"], "--base-config", "'x'"),
        (["--prediction-type", "epsilon"], "--prediction-type", "'epsilon'"),
        (["--features", "prime"], "--features", "at least 40 samples"),
        (["--clip", "no/where"], "--clip", "'no/where'"),
    ],
)
def test_wrong_arguments_are_one_line_that_names_them(tmp_path, capsys, arguments, name, shown):
    given = arguments if "--count" in arguments else [*arguments, "--count", "3"]
    assert run(*given, "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(rf"nexus evaluate: error: {re.escape(name)}(:| is required)", lines[0]), lines
    assert shown in lines[0]
    assert not (tmp_path / "out").exists()
