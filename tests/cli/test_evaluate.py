import json
import re
import subprocess
import sys
import tomllib

import pytest
from tests.refusals import refused

from nexus_adapters.cli import COMMANDS, main
from nexus_adapters.cli.evaluate import apply_options
from nexus_adapters.evaluation.config import LEAST_FOR_DISTANCES, with_defaults
from nexus_adapters.recipes import recipe_file

FAST = ["--count", "3", "--steps", "2", "--batch-size", "3"]


@pytest.fixture(scope="module", autouse=True)
def weights(module_weights):
    return module_weights


def run(*argv):
    return main(["evaluate", *map(str, argv)])


def results(out):
    return json.loads((out / "results.json").read_text())


def test_it_generates_scores_and_prints_the_table(weights, tmp_path, capsys):
    out = tmp_path / "out"
    adapters = ["--adapter", weights / "canny" / "prime", "--adapter", "peer=t2i"]
    assert run(*adapters, "--out", out, "--prompts", "empty", "--guidance", 3, *FAST) == 0
    shown = capsys.readouterr().out
    assert "no prompt; 2 steps, guidance scale 3, policy positive" in shown
    assert "| prime |" in shown
    assert "| peer |" in shown
    content = results(out)
    assert list(content["methods"]) == ["reference", "base", "prime", "peer"]
    assert content["methods"]["prime"]["adapter"].endswith("canny/prime")


@pytest.mark.full
def test_scenes_are_judged_by_the_embedded_clip(tmp_path):
    assert run("--out", tmp_path / "out", "--count", 40, "--steps", 1, "--batch-size", 40) == 0
    content = results(tmp_path / "out")
    assert {"clip_score", "frechet", "mmd"} <= set(content["methods"]["base"]["metrics"])
    assert "frechet" not in content["methods"]["reference"]["metrics"]
    assert content["settings"]["guidance_scale"] == 2


def test_the_kind_auto_overrides_the_one_of_a_file(tmp_path):
    content = {"data": {"kind": "tars"}}
    apply_options(content, {"data.kind": "auto", "data.path": str(tmp_path)})
    assert with_defaults(content)["data"] == {"kind": "folder", "path": str(tmp_path)}


def test_the_kind_of_data_is_found_out_as_nexus_prepare_does(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("tars/1.tar", "tars/0.tar", "table.csv", "index.json"):
        (tmp_path / name).touch()
    tars = [str(tmp_path / "tars" / name) for name in ("0.tar", "1.tar")]
    for path, expected in (
        (tmp_path / "tars" / "0.tar", {"kind": "tars", "shards": tars[:1]}),
        (tmp_path / "tars", {"kind": "tars", "shards": tars}),
        ("s3://b/{0..9}.tar", {"kind": "tars", "shards": ["s3://b/{0..9}.tar"]}),
        (tmp_path / "table.csv", {"kind": "table", "path": str(tmp_path / "table.csv")}),
        (tmp_path, {"kind": "prepared", "path": str(tmp_path)}),
    ):
        content = {}
        apply_options(content, {"data.path": str(path)})
        assert with_defaults(content)["data"] == expected
    coco = tmp_path / "coco" / "annotations"
    coco.mkdir(parents=True)
    (coco / "captions_train2017.json").touch()
    with refused("data.path", "COCO", hint="nexus prepare"):
        apply_options({}, {"data.path": str(coco.parent)})


def test_defaults_follow_from_the_data_and_the_base(tmp_path):
    scenes = {"guidance_scale": 2.0, "clip": "embedded", "features": "embedded"}
    data = {"kind": "scenes", "split": "test", "count": 500}
    assert with_defaults({}) == {**scenes, "data": data}
    few = {"data": {"count": LEAST_FOR_DISTANCES - 1}, "clip": ""}
    assert with_defaults(few) == {
        "guidance_scale": 2.0, "clip": "", "features": "", "data": {**data, "count": LEAST_FOR_DISTANCES - 1},
    }  # fmt: skip
    path = str(tmp_path)
    own = {"base": {"path": "x/y"}, "data": {"path": path}}
    assert with_defaults(own) == {**own, "guidance_scale": 7.5, "data": {"kind": "folder", "path": path}}
    assert with_defaults({"data": {"kind": "table"}})["data"] == {"kind": "table"}


FILE = """
num_inference_steps = 1
policy = "cond_only"
guidance_scale = 4.0
seed = 5
batch_size = 1
[adapters]
mine = "prime"
[data]
count = 1
[data.extractor]
low = 50
"""


def test_a_file_is_overridden_by_options_and_these_by_set(tmp_path):
    """What neither says has the default; options that are not given override nothing."""
    (tmp_path / "evaluation.toml").write_text(FILE)
    assert run(
        tmp_path / "evaluation.toml", "--out", tmp_path / "out", "--guidance", 3, "--seed", 6,
        "--adapter", "peer=t2i", "--option", "high=150", "--set", "seed=7", "--set", "adapters.other=slim",
    ) == 0  # fmt: skip
    content = results(tmp_path / "out")
    assert list(content["methods"]) == ["reference", "base", "mine", "peer", "other"]
    settings = content["settings"]
    found = {name: settings[name] for name in ("num_inference_steps", "policy", "guidance_scale", "seed")}
    assert found == {"num_inference_steps": 1, "policy": "cond_only", "guidance_scale": 3, "seed": 7}
    assert settings["data"]["count"] == 1
    assert content["asked_for"]["data"]["extractor"] == {"low": 50, "high": 150}


def test_a_recipe_that_ships_with_the_package(tmp_path):
    example = recipe_file("evaluate-embedded", "evaluate", "CONFIG")
    assert run("evaluate-embedded", "--out", tmp_path / "out", "--count", 1, "--steps", 1) == 0
    content, expected = results(tmp_path / "out"), tomllib.loads(example.read_text())
    assert list(content["methods"])[2:] == list(expected["adapters"])
    assert content["settings"]["guidance_scale"] == expected["guidance_scale"]


@pytest.mark.parametrize(
    ("text", "arguments", "name", "shown"),
    [
        ("num_steps = 3", [], "num_steps", "num_inference_steps"),
        ("[data]\nknd = 'folder'", [], "data.knd", "data.kind"),
        ("policy = 'all'", [], "policy", "'all'"),
        ("policy = 'all'", ["--scale", "-1"], "policy", "'all'"),
        ("scale = 2.0", ["--scale", "-1"], "--scale", "-1"),
        ("", ["--scale", "2", "--set", "scale=-1"], "scale", "-1"),
        ("[base]\npath = 'no/where'", [], "base.path", "'no/where'"),
        ("[base]\npath = 'no/where'", ["--base", "nowhere"], "--base", "'nowhere'"),
        ("[data]\npath = 'no/where'", [], "data.path", "'no/where'"),
        ("[data]\nkind = 'tars'", ["--data", "no/where.tar"], "--data", "no/where.tar"),
        ("[data]\nkind = 'folder'", [], "data.path", ""),
        ("[adapters]\nmine = 'nothing'", [], "adapters", "'nothing'"),
        ("[adapters]\nmine = 3", [], "adapters.mine", "3"),
        ("adapters = 'prime'", [], "adapters", "'prime'"),
        ("[data.extractor]\nlo = 3", [], "data.extractor", "'lo'"),
        ("[judge]\nlow = 'x'", [], "judge.low", "'x'"),
        ("imports = ['nothing_there']", [], "imports", "'nothing_there'"),
        ("data = 3", [], "data", "3"),
        ("data = 3", ["--count", "4"], "data", "3"),
        ("seed", [], "CONFIG", "evaluation.toml"),
        ("", ["--set", "seed"], "--set", "'seed'"),
    ],
)
def test_wrong_files_are_one_line_that_names_the_key(tmp_path, capsys, text, arguments, name, shown):
    (tmp_path / "evaluation.toml").write_text(text)
    assert run(tmp_path / "evaluation.toml", *arguments, "--out", tmp_path / "out") == 2
    refused_in_one_line(capsys, name, shown)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "none.toml", "--out", tmp_path / "out") == 2
    refused_in_one_line(capsys, "CONFIG", "none.toml")


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
        (["--kind", "tars"], "--data", "is required"),
        (["--kind", "scenes", "--data", "x"], "--data", "'x'"),
        (["--data", "no/where"], "--data", "'no/where'"),
        (["--kind", "tars", "--data", "no/where.tar"], "--data", "no/where.tar"),
        (["--steps", "0"], "--steps", "got 0"),
        (["--noise-exponent", "-1"], "--noise-exponent", "got -1"),
        (["--guidance", "-1"], "--guidance", "got -1"),
        (["--guidance", "nan"], "--guidance", "nan"),
        (["--scale", "-1"], "--scale", "got -1"),
        (["--seed", "-1"], "--seed", "got -1"),
        (["--batch-size", "0"], "--batch-size", "got 0"),
        (["--first", "-1"], "--first", "got -1"),
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
    refused_in_one_line(capsys, name, shown)
    assert not (tmp_path / "out").exists()


def refused_in_one_line(capsys, name, shown):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.match(rf"nexus evaluate: error: {re.escape(name)}(:| is required)", lines[0]), lines
    assert shown in lines[0]


def test_what_is_wrong_with_arguments_is_said_before_anything_slow_is_imported(tmp_path):
    """In a process of its own, which has imported nothing yet."""
    code = (
        "import sys; from nexus_adapters.cli import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    out = ("--out", str(tmp_path / "out"))
    for arguments in (["missing.toml"], ["--adapter", "a=prime", "--adapter", "a=slim"]):
        command = [sys.executable, "-c", code, "evaluate", *arguments, *out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_help_shows_no_internal_names(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
    assert "GIVEN" not in capsys.readouterr().out


@pytest.mark.parametrize("package", ["torchmetrics", "scipy"])
def test_a_missing_package_is_reported_before_anything_is_generated(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert run("--count", "3", "--out", tmp_path / "out") == 2
    refused_in_one_line(capsys, f"the package {package}", f"Run pip install {package}")
    assert not (tmp_path / "out").exists()
