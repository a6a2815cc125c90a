import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tests.refusals import refused
from tests.study.plans import PLAN, study, write_plan, write_world

from nexus_adapters.cli import main
from nexus_adapters.study import cells as module
from nexus_adapters.study.cells import described, is_done, run_study
from nexus_adapters.study.plan import Cell, Study
from nexus_adapters.study.report import results_of, write_study
from nexus_adapters.study.results import completed, load_result, planned_settings
from nexus_adapters.training.config import LossOptions

SILENT = "[train]\nlog.every_steps = 100\n"
ONE_CELL = '[[cells]]\nconditions = ["canny"]\nmethods = ["prime"]\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(root):
    planned = study(root)
    assert run_study(planned) == []
    write_study(planned, root / "out")
    return planned


@pytest.fixture
def untrained(monkeypatch):
    """Whatever trains or draws fails."""
    monkeypatch.setattr(module, "train_adapter", None)
    monkeypatch.setattr(module, "evaluate", None)


def table(root):
    return list(csv.DictReader((root / "out" / "tiny.csv").read_text().splitlines()))


def test_every_cell_is_trained_and_measured_from_every_view(finished, root):
    rows = table(root)
    assert {(row["method"], row["seed"]) for row in rows} == {
        ("base", "0"), ("t2i", "0"), ("prime", "0"), ("prime+per_branch", "0"), ("prime", "1"), ("t2i", "1"),
    }  # fmt: skip
    assert {row["condition"] for row in rows} == {"canny"}
    metrics = {row["metric"] for row in rows if row["method"] == "prime"}
    assert metrics == {"parameters", "gmacs", "edge_f1", "ms_ssim", "edge_f1@empty", "ms_ssim@empty"}
    for row in rows:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    runs = sorted(path.name for path in (root / "study" / "runs").iterdir())
    assert runs == ["canny-prime-0", "canny-prime-1", "canny-t2i-0", "canny-t2i-1"]


def test_cells_differ_by_seed_and_by_how_they_are_drawn(finished):
    results = results_of(finished)
    prime, other, per_branch = (
        results[Cell("canny", *rest)].views["own"].scores["ms_ssim"]
        for rest in (("prime", 0), ("prime", 1), ("prime+per_branch", 0))
    )
    assert not np.array_equal(prime, other)
    assert not np.array_equal(prime, per_branch)


def test_what_the_results_are_made_with_is_told(finished):
    results = results_of(finished)
    made_with = results[Cell("canny", "prime", 0)].made_with
    assert made_with["machine"]["accelerator"] == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else None
    )
    assert made_with["precision"] == {"trained": "float32", "drawn": "float32"}
    assert set(results[Cell("canny", "base", 0)].made_with["precision"]) == {"drawn"}


def test_the_datas_own_pictures_are_scored_once_for_all_cells(finished, root):
    evaluations = root / "study" / "evaluations"
    shared = [path for path in evaluations.rglob("scores-*") if "reference" in str(path)]
    assert len(shared) == 2  # of the own view, and of the one without words
    assert {path.parts[len(evaluations.parts)] for path in shared} == {"reference"}


def test_each_seeds_difference_is_told(finished, root):
    lines = (root / "out" / "tiny.md").read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if "each seed" in line)
    rows = [line.split(" | ") for line in lines[start + 2 : start + 3]]
    assert [cell.strip("| ") for cell in rows[0][:2]] == ["prime", "0, 1"]
    results = results_of(finished)
    apart = [
        results[Cell("canny", "prime", seed)].views["own"].value("ms_ssim")
        - results[Cell("canny", "t2i", seed)].views["own"].value("ms_ssim")
        for seed in (0, 1)
    ]
    assert rows[0][-1].strip("| ").split(", ") == [f"{value:+.3f}" for value in apart]
    assert "prime+per_branch" not in "".join(lines[start + 2 : start + 4])  # of one seed


@pytest.mark.parametrize("is_there", [False, True])
def test_on_a_gpu_operations_are_those_that_repeat(monkeypatch, is_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with module.repeatable():
        assert torch.are_deterministic_algorithms_enabled() == is_there
        assert torch.backends.cuda.cudnn_sdp_enabled() != is_there
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_finished_study_does_nothing_more(finished, untrained):
    assert run_study(finished) == []
    assert described(finished).splitlines()[0].split() == ["canny-base-0", "done"]


def test_deleted_results_come_back_the_same(finished, root):
    before = {path.name: path.read_bytes() for path in sorted((root / "out").glob("tiny*"))}
    assert set(before) == {"tiny.csv", "tiny.md", "tiny.json", "tiny-metrics.webp", "tiny-cost.webp"}
    shutil.rmtree(root / "study" / "results")
    shutil.rmtree(root / "study" / "evaluations")
    shutil.rmtree(root / "out")
    run_study(finished)
    write_study(finished, root / "out")
    for name, content in before.items():
        if name != "tiny.json":  # which has times
            assert (root / "out" / name).read_bytes() == content, name


def test_the_report_needs_the_results_alone(finished, root, tmp_path, untrained):
    assert main(["study", str(finished.path), "--out", str(tmp_path), "--report"]) == 0
    text = (tmp_path / "tiny.md").read_text()
    assert text == (root / "out" / "tiny.md").read_text()
    assert "| prime | 0, 1 |" in text
    assert "| Minus t2i |" in text
    assert "### canny, empty" in text
    assert Image.open(tmp_path / "tiny-metrics.webp").size[0] > 300


def test_what_only_draws_in_another_way_is_told_alone_too(finished, root, tmp_path, untrained):
    (tmp_path / "results").mkdir()
    for file in finished.results.glob("canny-prime+per_branch-0.*"):
        shutil.copy(file, tmp_path / "results")
    text = PLAN.replace("compare_to", f'results = "{tmp_path}/results"\ncompare_to')
    planned = Study(write_plan(root, "alone", text))
    written = write_study(planned, tmp_path / "out")
    assert {path.name for path in written} >= {"alone-cost.webp", "alone-metrics.webp", "alone.md"}
    assert "| prime+per_branch | 0 |" in (tmp_path / "out" / "alone.md").read_text()


def test_other_settings_are_measured_anew_and_others_stay(finished, root):
    text = PLAN.replace('policy = "per_branch"', 'policy = "cond_only"').replace(
        "{root}/study", "{root}/other"
    )
    shutil.copytree(root / "study", root / "other")
    changed, cell = study(root, name="changed", text=text), Cell("canny", "prime+per_branch", 0)
    assert not is_done(changed, cell)
    assert is_done(changed, Cell("canny", "prime", 0))
    before = results_of(finished)[cell].views["own"].scores["ms_ssim"]
    assert cell not in results_of(changed)  # what is there is of another plan
    run_study(changed)
    assert not np.array_equal(results_of(changed)[cell].views["own"].scores["ms_ssim"], before)


def test_another_recipe_in_the_same_folder_is_refused(finished, root):
    longer = "[train.training]\nmax_train_steps = 3\n[evaluate]"
    changed = study(root, name="longer", text=PLAN.replace("[evaluate]", longer))
    with refused("cell canny-t2i-0: output_dir", f"'{root / 'study' / 'runs' / 'canny-t2i-0'}'"):
        run_study(changed)


def test_a_cell_that_another_process_is_at_is_left_to_it(finished):
    with module.alone(finished, Cell("canny", "prime", 0)) as is_ours:
        assert is_ours
        assert run_study(finished) == [Cell("canny", "prime", 0), Cell("canny", "prime+per_branch", 0)]


def test_results_are_kept_whole(finished):
    found = load_result(finished.results, Cell("canny", "prime", 0))
    assert found.facts["parameters"] > 0
    assert found.facts["gmacs"] > 0
    assert found.settings["views"]["empty"]["prompts"] == "empty"
    assert found.made_with["versions"]["torch"]
    assert load_result(finished.results, Cell("canny", "prime", 7)) is None


LOSSES = """
recipe = "recipe.toml"
folder = "{root}/losses"

[train.validation]
every_steps = 2
images = 0
samples = 2

[methods.fast]
train.training.learning_rate = 0.1

[methods.slow]

[[cells]]
conditions = ["canny"]
methods = ["fast", "slow"]
"""


def test_a_study_of_losses_draws_nothing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "evaluate", None)
    path = write_plan(root, "losses", LOSSES)
    assert main(["study", str(path), "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "losses.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["fast", "slow"]
    assert float(rows[0]["val_loss"]) != float(rows[1]["val_loss"])
    assert json.loads((tmp_path / "losses.json").read_text())["missing"] == []
    assert not (tmp_path / "losses.md").exists()


def test_processes_that_were_launched_together_are_refused(finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("study", "2", expected="one process"):
        run_study(finished)


def test_results_that_are_shared_need_no_runs(finished, root, tmp_path, untrained):
    shutil.copytree(finished.results, tmp_path / "shared")
    text = PLAN.replace("{root}/study", f"{tmp_path}/none").replace("{root}", str(root))
    text = 'results = "shared"\n' + text.replace("recipe.toml", f"{root}/recipe.toml")
    moved = study(tmp_path, name="tiny", text=text)
    assert run_study(moved) == []
    assert list(results_of(moved)) == list(results_of(finished))
    write_study(moved, tmp_path / "out")
    assert (tmp_path / "out" / "tiny.csv").read_bytes() == (root / "out" / "tiny.csv").read_bytes()
    file = tmp_path / "shared" / "canny-prime-0.json"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    assert not is_done(moved, Cell("canny", "prime", 0))
    assert is_done(moved, Cell("canny", "prime", 1))


def test_a_result_of_other_weights_than_its_own_adapters_is_not_told(finished, root, tmp_path, monkeypatch):
    shutil.copytree(finished.results, tmp_path / "shared")
    text = PLAN.replace("{root}/study", f"{tmp_path}/none").replace("{root}", str(root))
    moved = study(
        tmp_path,
        name="tiny",
        text='results = "shared"\n' + text.replace("recipe.toml", f"{root}/recipe.toml"),
    )
    own, other = Cell("canny", "prime", 0), Cell("canny", "prime+per_branch", 0)
    file = tmp_path / "shared" / f"{own.name}.json"
    told = json.loads(file.read_text())
    told["settings"]["adapter_sha256"] = "of another machine"
    file.write_text(json.dumps(told))
    assert own in results_of(moved)
    assert other not in results_of(moved)
    (tmp_path / "shared" / f"{other.name}.json").unlink()
    assert run_study(moved) == []  # trains for the one, and measures both
    found = results_of(moved)
    assert found[own].settings["adapter_sha256"] == found[other].settings["adapter_sha256"] != ""
    before = results_of(finished)[own].views["own"].scores["ms_ssim"]
    assert np.array_equal(found[own].views["own"].scores["ms_ssim"], before)


def test_where_the_home_lies_decides_nothing(root, monkeypatch):
    found = []
    for home in ("/home/ada", "/home/bob"):
        monkeypatch.setenv("HOME", home)
        planned = study(root, name="home", text=PLAN.replace('"{root}/base"', '"~/base"'))
        cell = planned.cells()[0]
        assert planned.evaluation_config(cell, "own").base.path == f"{home}/base"
        found.append(planned_settings(planned, cell))
    assert found[0] == found[1]
    assert "/home" not in json.dumps(found[0])
    with_homes = json.loads(json.dumps(found[0]).replace("~/", "/home/bob/"))
    assert completed(with_homes) == completed(found[0])  # as results were kept before


def test_a_run_that_logged_nothing_has_facts_too(root):
    text = PLAN.replace("{root}/study", "{root}/silent").replace("[evaluate]", SILENT + "[evaluate]")
    planned = study(root, name="silent", text=text[: text.index("[[cells]]")] + ONE_CELL)
    run_study(planned)
    (result,) = results_of(planned).values()
    assert result.facts["parameters"] > 0
    assert not {"val_loss", "step_s"} & set(result.facts)


def test_losses_are_weighed_as_the_training_draws_timesteps():
    row = {"val_loss": 0.0} | {f"val_loss_{place}00": float(place == 9) for place in range(10)}
    uniform, cubic = (module._loss_as_trained(row, LossOptions(timesteps=t)) for t in ("uniform", "cubic"))
    assert uniform == pytest.approx(0.1, abs=1e-3)
    assert cubic == pytest.approx(0.1 ** (1 / 3), abs=1e-3)  # t = 1 - u^3 is above 0.9 for u below this
    upper = module._loss_as_trained(row, LossOptions(timesteps="uniform", band=(0.5, 1.0)))
    assert upper == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("line", "name", "received", "expected"),
    [
        ('clip = "no/where"', "clip", "'no/where'", "a folder or the Hub id of a vision model"),
        ('features = "embedded"', "features", "3", "at least 40 samples"),
    ],
)
def test_what_an_evaluation_lacks_is_told_before_the_training(
    root, monkeypatch, line, name, received, expected
):
    monkeypatch.setattr(module, "train_adapter", None)
    text = PLAN.replace("/study", "/early").replace("batch_size = 3", f"batch_size = 3\n{line}")
    planned = study(root, name="early", text=text.replace('methods = ["base", "t2i"', 'methods = ["t2i"'))
    with refused(f"cell canny-t2i-0: {name}", received, expected=expected):
        run_study(planned)


def test_a_result_from_before_an_option_existed_had_its_default(finished, untrained):
    cell = Cell("canny", "prime", 0)
    file = finished.folder / "results" / f"{cell.name}.json"
    before = file.read_text()
    content = json.loads(before)
    del content["settings"]["train"]["adapter.noise_exponent"]
    del content["settings"]["views"]["own"]["noise_exponent"]
    del content["settings"]["views"]["own"]["data"]["aspect_buckets"]
    try:
        file.write_text(json.dumps(content))
        assert is_done(finished, cell)
        assert cell in results_of(finished)
        content["settings"]["views"]["own"]["policy"] = "cond_only"
        file.write_text(json.dumps(content))
        assert not is_done(finished, cell)
    finally:
        file.write_text(before)
