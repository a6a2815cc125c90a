from pathlib import Path

import pytest
from tests.refusals import refused
from tests.study.plans import PLAN, study, write_plan

from nexus_adapters.cli import main
from nexus_adapters.errors import MISSING
from nexus_adapters.methods.t2i import T2IOptions
from nexus_adapters.study.plan import Cell, Study
from nexus_adapters.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("named", ["scores", "scores.npz"])
def test_results_are_one_file(root, named):
    assert study(root).results == root / "study" / "results.npz"
    planned = study(root, name="shared", text=f'results = "{named}"\n' + PLAN)
    assert planned.results == root / "scores.npz"


def test_cells_come_in_order_and_once(root):
    names = [cell.name for cell in study(root).cells()]
    assert names == [
        "canny-base-0", "canny-t2i-0", "canny-prime-0", "canny-prime+per_branch-0", "canny-prime-1",
        "canny-t2i-1",
    ]  # fmt: skip


def test_what_is_nearer_to_the_method_wins(root):
    planned = study(root)
    train = planned.train_config(Cell("canny", "t2i", 1))
    assert (train.adapter, train.seed) == (T2IOptions("t2i"), 1)
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
    ("before", "after", "key", "received", "expected"),
    [
        ('recipe = "recipe.toml"', 'recipe = "none.toml"', "recipe", "none.toml'", "a TOML file"),
        ('recipe = "recipe.toml"', "", "recipe", MISSING, ""),
        ('methods = ["prime", "t2i"]', 'methods = ["prim"]', "cells", "'prim'", "base, t2i, prime"),
        (
            'trained_as = "prime"',
            'trained_as = "me"',
            "methods.prime+per_branch.trained_as",
            "'me'",
            "a method that is trained",
        ),
        ('compare_to = "t2i"', 'compare_to = "t3i"', "compare_to", "'t3i'", "t2i, prime"),
        ("[views.empty]", "[views.own]", "views", "'own'", "names other than own"),
        ("[views.empty]", '[views."a/b"]', "views", "'a/b'", "name of letters"),
        ("[methods.prime]", "[methods.reference]", "methods", "'reference'", "reference"),
        ("[methods.prime]", "[methods.base]", "methods", "'base'", "a name other than base"),
        ("[methods.prime]", '[methods."scores.csv"]', "methods", "'scores.csv'", "a name other than base"),
        ("[methods.prime]", "[methods.T2I]", "methods", "'T2I'", "more than case"),
        ("num_inference_steps = 2", "num_steps = 2", "num_steps", None, "num_inference_steps"),
        (
            "num_inference_steps = 2",
            "num_inference_steps = 0",
            "num_inference_steps",
            "0",
            "a number greater than 0",
        ),
        ("seeds = [0, 1]", "seeds = []", "cells.1.seeds", "[]", ""),
        ('method = "t2i"', 'method = "t9i"', "adapter.method", "'t9i'", "prime, slim"),
        (
            'adapter.method = "t2i"',
            'adapter = {{ method = "t2i", residual = false }}',
            "adapter.residual",
            "False",
            "'t2i'",
        ),
        (
            'evaluate.policy = "per_branch"',
            "evaluate.seed = 3",
            "methods.prime+per_branch.evaluate",
            "'seed'",
            "policy, scale",
        ),
        ("[evaluate]", "[evaluat", "PLAN", "wrong.toml'", "TOML"),
    ],
)
def test_wrong_plans_are_one_error_that_names_the_key(root, capsys, before, after, key, received, expected):
    assert before in PLAN
    path = write_plan(root, "wrong", PLAN.replace(before, after, 1))
    with refused(key, received, expected=expected):
        Study(path)
    assert main(["study", str(path), "--out", str(root / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert key in line


def test_a_missing_plan_is_one_error(tmp_path, capsys):
    assert main(["study", str(tmp_path / "no.toml"), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PLAN: " in line
    assert f"'{tmp_path / 'no.toml'}'" in line


def test_a_dry_run_says_what_is_left(root, capsys):
    path = write_plan(root, "dry", PLAN.replace("/study", "/nowhere"))
    assert main(["study", str(path), "--out", str(root / "none"), "--dry-run"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["canny-base-0", "trained"], ["canny-t2i-0", "to train"]]
    assert not (root / "none").exists()


def test_a_dry_run_refuses_what_the_run_refuses(root, capsys):
    for name, before, after, key in (
        ("few", "count = 3 }", "count = 99 }", "data.count"),
        (
            "optimizer",
            "[evaluate]",
            '[train.adapter]\nstart_from = "no/where"\n[evaluate]',
            "adapter.start_from",
        ),
    ):
        path = write_plan(root, name, PLAN.replace("/study", f"/{name}").replace(before, after, 1))
        assert main(["study", str(path), "--out", str(root / "none"), "--dry-run"]) == 2
        assert key in capsys.readouterr().err


def test_scenes_have_the_split_and_count_that_nexus_evaluate_gives_them(root):
    scenes = '[evaluate]\nbase.path = "embedded"\ndata = {{ kind = "scenes"COUNT }}\n[views'
    for count, expected in (("", 500), (", count = 2", 2)):
        parts = PLAN.partition("[evaluate]"), PLAN.partition("[views")
        path = write_plan(root, "scenes", parts[0][0] + scenes.replace("COUNT", count) + parts[1][2])
        data = Study(path).evaluation_config(Cell("canny", "base", 0), "own").data
        assert (data.split, data.count) == ("test", expected)


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
        "embedded-canny", where
    )
