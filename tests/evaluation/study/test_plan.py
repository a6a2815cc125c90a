from pathlib import Path

import pytest
from tests.evaluation.study.plans import PLAN, study, write_plan, write_world

from nexus_adapters.cli import main
from nexus_adapters.evaluation.study.plan import Cell, Study
from nexus_adapters.training.recipe import load_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def test_cells_come_in_order_and_once(root):
    names = [cell.name for cell in study(root).cells()]
    assert names == [
        "canny-base-0", "canny-t2i-0", "canny-prime-0", "canny-prime+per_branch-0", "canny-prime-1",
        "canny-t2i-1",
    ]  # fmt: skip


def test_what_is_nearer_to_the_method_wins(root):
    planned = study(root)
    train = planned.train_config(Cell("canny", "t2i", 1))
    assert (train.adapter.method, train.adapter.residual, train.seed) == ("t2i", False, 1)
    assert train.training.max_train_steps == 2
    drawn = planned.evaluation_config(Cell("canny", "prime+per_branch", 0), "empty")
    assert (drawn.policy, drawn.prompts, drawn.data.count) == ("per_branch", "empty", 3)
    assert planned.train_config(Cell("canny", "base", 0)) is None


def test_a_method_that_is_trained_as_another_shares_its_run(root):
    planned = study(root)
    one, other = (planned.train_config(Cell("canny", name, 1)) for name in ("prime", "prime+per_branch"))
    assert one == other


def test_conditions_may_have_a_judge(root):
    text = PLAN + '[conditions.depth]\njudge.model = "~/judge"\n'
    planned = study(root, name="judged", text=text)
    judge = planned.evaluation_config(Cell("depth", "prime", 0), "own").judge
    assert judge["model"].endswith("/judge")
    assert "~" not in judge["model"]
    assert planned.evaluation_config(Cell("canny", "prime", 0), "own").judge == {}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('recipe = "recipe.toml"', 'recipe = "none.toml"', "recipe: expected a TOML file; received"),
        ('recipe = "recipe.toml"', "", "^recipe: expected a value; received none$"),
        (
            'methods = ["prime", "t2i"]',
            'methods = ["prim"]',
            "cells: expected methods among .*; received 'prim'",
        ),
        (
            'trained_as = "prime"',
            'trained_as = "me"',
            "methods.prime.per_branch.trained_as: expected a method",
        ),
        ('compare_to = "t2i"', 'compare_to = "t3i"', "compare_to: expected one of .*; received 't3i'"),
        ("[views.empty]", "[views.own]", "views: expected names other than own"),
        ("[views.empty]", '[views."a/b"]', "views: expected names of letters, .*; received 'a/b'"),
        ("[methods.prime]", "[methods.reference]", "methods: expected names of letters, .* than reference"),
        ("[methods.prime]", "[methods.base]", "methods: expected names other than base"),
        ("num_inference_steps = 2", "num_steps = 2", "num_steps: no such key"),
        (
            "num_inference_steps = 2",
            "num_inference_steps = 0",
            "num_inference_steps: expected a number greater",
        ),
        ("seeds = [0, 1]", "seeds = []", "cells.1.seeds"),
        ('method = "t2i"', 'method = "t9i"', "adapter.method: expected 'prime'"),
        (
            'evaluate.policy = "per_branch"',
            "evaluate.seed = 3",
            "methods.prime.per_branch.evaluate: expected some of policy, .*; received 'seed'",
        ),
        ("[evaluate]", "[evaluat", "PLAN: expected TOML"),
    ],
)
def test_wrong_plans_are_one_error_that_names_the_key(root, capsys, before, after, message):
    assert before in PLAN
    path = write_plan(root, "wrong", PLAN.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        Study(path)
    assert main(["study", str(path), "--out", str(root / "none")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_missing_plan_is_one_error(tmp_path, capsys):
    assert main(["study", str(tmp_path / "no.toml"), "--out", str(tmp_path)]) == 2
    assert "PLAN: expected a TOML file; received" in capsys.readouterr().err


def test_a_dry_run_says_what_is_left(root, capsys):
    path = write_plan(root, "dry", PLAN.replace("/study", "/nowhere"))
    assert main(["study", str(path), "--out", str(root / "none"), "--dry-run"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["canny-base-0", "trained"], ["canny-t2i-0", "to train"]]
    assert not (root / "none").exists()


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks" / "plans").glob("*.toml")), ids=lambda p: p.stem)
def test_the_projects_plans_are_valid(plan):
    cells = Study(plan).cells()
    assert len({cell.name for cell in cells}) == len(cells) > 1


def test_the_plans_train_by_the_embedded_recipe_but_for_its_heads(tmp_path):
    where = [f"output_dir={tmp_path}"]
    ours = load_recipe(ROOT / "benchmarks" / "recipe.toml", where)
    eight = ["adapter.heads=8", "adapter.head_width=8"]
    assert ours.adapter.heads == 0
    assert load_recipe(ROOT / "benchmarks" / "recipe.toml", where + eight) == load_recipe(
        ROOT / "recipes" / "embedded-canny.toml", where
    )


def test_the_main_study_has_what_it_is_to_compare():
    cells = Study(ROOT / "benchmarks" / "plans" / "study.toml").cells()
    for condition in ("canny", "depth", "sketch", "segmentation"):
        methods = {cell.method for cell in cells if cell.condition == condition}
        assert methods >= {"base", "t2i", "controlnet", "controlnet-xs", "prime", "slim"}
        assert methods >= {"prime+residual", "slim+residual"}
    assert {cell.seed for cell in cells if cell.method in ("t2i", "prime", "slim")} == {0, 1, 2}
