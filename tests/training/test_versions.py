"""What runs of earlier versions have left, and that a run's checkpoints can be used alone."""

import dataclasses
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from safetensors.torch import load_file
from tests.refusals import refused
from tests.training.runs import config, run

from nexus_adapters import NexusAdapter, load_adapter
from nexus_adapters.cli import main
from nexus_adapters.files import file_sha256
from nexus_adapters.training.recipe import dump_config, first_version_adapter, load_recipe, load_run_recipe
from nexus_adapters.training.run_folder import check_run_folder
from nexus_adapters.training.run_identity import differing, identity

GOLDEN = Path(__file__).parents[1] / "golden"
STEP = "checkpoints/step-00000002"


@pytest.fixture
def old(tmp_path):
    """A run that the version before formats had numbers has left, without an adapter."""
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    shutil.copytree(GOLDEN / "pipeline", tmp_path / "base")
    file = tmp_path / "run" / "config.toml"
    content = tomllib.loads(file.read_text())
    content["base"]["path"] = str(tmp_path / "base")
    file.write_text(tomli_w.dumps(content))
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["", STEP])
def test_an_old_runs_checkpoint_is_loaded(old, part):
    """With its average, and as its recipe says: a recipe without a format number is of the first."""
    adapter = load_adapter(old / part)
    assert isinstance(adapter, NexusAdapter)
    assert not adapter.training
    assert adapter.variant == "slim"
    assert (adapter.config.heads, adapter.config.head_width, adapter.config.noise_exponent) == (2, 4, 0.5)
    average = load_file(old / STEP / "average.safetensors")
    assert adapter.state_dict().keys() == average.keys()
    assert all(torch.equal(tensor, average[name]) for name, tensor in adapter.state_dict().items())
    inputs, expected = (load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "features"))
    with torch.no_grad():
        features = adapter(inputs["condition"], inputs["prompt_embeds"])
    for place, feature in enumerate(features):
        wanted = expected[f"run.{place}"].float()  # kept in half precision
        assert torch.allclose(feature, wanted, rtol=2**-10, atol=2**-14), (feature - wanted).abs().max()


@pytest.mark.parametrize(
    ("changes", "variant"),
    [
        ({"method": "slim"}, "slim-paper"),
        ({"method": "slim", "residual": False}, "slim-paper"),
        ({"method": "slim", "residual": True}, "slim"),
    ],
)
def test_the_names_of_then_mean_what_they_meant(old, changes, variant):
    """ "slim" alone was the paper's."""
    file = old / "config.toml"
    content = tomllib.loads(file.read_text())
    content["adapter"] = {"heads": 2, "head_width": 4} | changes
    file.write_text(tomli_w.dumps(content))
    assert load_adapter(old).variant == variant
    assert load_run_recipe(file).adapter.arguments["residual"] is (variant == "slim")


def test_an_old_checkpoint_away_from_its_run(old, tmp_path):
    moved = shutil.copytree(old / STEP, tmp_path / "moved")
    with refused("adapter", str(moved), hint="run"):
        load_adapter(moved)


def test_an_old_checkpoint_whose_base_is_gone(old):
    shutil.rmtree(old.parent / "base")
    with refused("adapter", str(old.parent / "base"), expected="base"):
        load_adapter(old)


@pytest.mark.parametrize("name", ["average.safetensors", "state.json"])
def test_a_checkpoint_that_has_changed(old, name):
    (old / STEP / name).write_bytes((old / STEP / name).read_bytes() + b" ")
    with refused("adapter", name):
        load_adapter(old)


def test_an_old_run_is_the_same_run_now():
    """Its recipe of then decides what it decided."""
    before = json.loads((GOLDEN / "run" / STEP / "state.json").read_text())["identity"]
    recipe = load_run_recipe(GOLDEN / "run" / "config.toml")
    now = identity(recipe) | {name: before[name] for name in ("samples", "global_batch_size")}
    assert differing(before, now) is None
    assert differing(now, before) is None
    assert "adapter.size_ratio" not in now  # which had no effect
    for key, value in (("seed", 1), ("output_dir", "other")):
        other = differing(
            before, identity(dataclasses.replace(recipe, **{key: value})) | now_without(now, key)
        )
        assert other == (key if key == "seed" else None)


def now_without(now, key):
    return {name: now[name] for name in ("samples", "global_batch_size") if name != key}


def test_an_old_runs_recipe_repeats_it(old, tmp_path):
    """Given to the command as any recipe: it has every option of then, and no format number."""
    file = old / "config.toml"
    assert load_recipe(file) == load_run_recipe(file)
    assert load_recipe(file, ["adapter.heads=4"]).adapter.heads == 4
    content = tomllib.loads(file.read_text())
    file = tmp_path / "recipe.toml"
    file.write_text(tomli_w.dumps(content | {"adapter": FIRST}))
    assert load_recipe(file).adapter.arguments["residual"] is False  # as "prime" meant then
    for key in ("size_ratio", "reads_prompt"):  # a recipe of today, with a key that has no effect
        file.write_text(tomli_w.dumps(content | {"adapter": {"method": "t2i", key: FIRST[key]}}))
        with refused(f"adapter.{key}", repr(FIRST[key])):
            load_recipe(file)


def test_an_old_recipe_that_starts_from_an_adapter_is_of_a_prime(tmp_path):
    """Which was the default of then, whatever the adapter is."""
    file = tmp_path / "config.toml"
    section = {"start_from": "gone"}
    file.write_text(tomli_w.dumps({"output_dir": "out", "data": {"path": "x"}, "adapter": section}))
    assert load_run_recipe(file).adapter.method == "prime"


def test_an_old_runs_folder_takes_the_same_recipe_alone(old):
    recipe = load_run_recipe(old / "config.toml")
    mine = dataclasses.replace(recipe, output_dir=str(old))
    check_run_folder(mine)
    other = dataclasses.replace(mine, adapter=dataclasses.replace(mine.adapter, heads=4))
    with refused("output_dir", "2", expected="adapter.heads=4"):
        check_run_folder(other)
    other = dataclasses.replace(mine, adapter=dataclasses.replace(mine.adapter, block="twice"))
    with refused("output_dir", "'paper'", expected="adapter.block='twice'"):
        check_run_folder(other)


# A recipe's [adapter] as runs of the first version have kept it, with every option that there was.
FIRST = {
    "method": "prime",
    "residual": False,
    "zero_init": False,
    "groups": 0,
    "heads": 0,
    "head_width": 0,
    "noise_exponent": 0.0,
    "reads_prompt": True,
    "size_ratio": 0.125,
    "start_from": "",
}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"method": "prime", "residual": False}),
        ({"residual": True, "zero_init": True}, {"residual": True, "zero_init": True}),
        ({"method": "slim", "groups": 4, "heads": 8, "head_width": 8}, {"groups": 4, "residual": False}),
        ({"residual": True, "reads_prompt": False}, {"reads_prompt": False}),
        ({"method": "t2i", "noise_exponent": 0.5}, {"noise_exponent": 0.5}),
        ({"method": "t2i", "start_from": "somewhere"}, {"start_from": "somewhere"}),
        ({"method": "controlnet"}, {"method": "controlnet"}),
        ({"method": "controlnet-xs", "size_ratio": 0.25}, {"size_ratio": 0.25}),
        ({"start_from": "somewhere", "noise_exponent": 0.0}, {"noise_exponent": 0.0}),
    ],
)
def test_recipes_of_the_first_version_are_read_as_they_were_meant(tmp_path, changes, kept):
    section = FIRST | changes
    file = tmp_path / "config.toml"
    content = {
        "output_dir": "out",
        "data": {"path": "x"},
        "adapter": section,
        "validation": {"every_steps": 0},
    }
    file.write_text(tomli_w.dumps(content))
    found = load_run_recipe(file)
    assert {name: getattr(found.adapter, name) for name in kept} == kept
    before = {name: value for name, value in identity(found).items() if not name.startswith("adapter.")}
    before |= {f"adapter.{name}": value for name, value in section.items()}
    assert differing(before, identity(found)) is None
    file.write_text(dump_config(found))  # as a run of today keeps it
    assert load_run_recipe(file) == found
    # And what a recipe left out then had its default of then.
    least = {name: value for name, value in section.items() if value != FIRST[name] or name == "method"}
    assert first_version_adapter(least)["method"] == section["method"]
    file.write_text(tomli_w.dumps(content | {"adapter": least}))
    assert differing(before, identity(load_run_recipe(file))) is None


KINDS = {
    "prime": NexusAdapter,
    "slim-paper": NexusAdapter,
    "t2i": T2IAdapter,
    "controlnet": ControlNetModel,
    "controlnet-xs": ControlNetXSAdapter,
}


IN_FULL = [pytest.param(method, marks=pytest.mark.full) for method in ("slim-paper", "controlnet")]


@pytest.mark.parametrize("method", ["prime", "t2i", "controlnet-xs", *IN_FULL])
def test_a_checkpoint_is_loaded_alone(root, tmp_path, method):
    changes = {"adapter__method": method, "training__ema_decay": 0.5}
    if method == "controlnet-xs":
        changes |= {"adapter__size_ratio": 1.0}
    if method in ("prime", "t2i"):
        changes["adapter__noise_exponent"] = 0.5
    if method == "t2i":
        changes["base__path"] = str(root / "sd15")
    run(root, tmp_path / "out", **changes)
    moved = shutil.copytree(tmp_path / "out" / STEP, tmp_path / "moved")
    shutil.rmtree(tmp_path / "out")
    adapter = load_adapter(moved)
    assert isinstance(adapter, KINDS[method])
    average = load_file(moved / "average.safetensors")
    assert adapter.state_dict().keys() == average.keys()
    assert all(torch.equal(tensor, average[name]) for name, tensor in adapter.state_dict().items())
    assert adapter.config.get("noise_exponent", 0.0) == changes.get("adapter__noise_exponent", 0.0)


def as_of_old(out, section):
    """Make of a run one of the first version: its checkpoints do not say what they are of."""
    file = out / "config.toml"
    content = tomllib.loads(file.read_text())
    del content["format_version"], content["imports"]
    content["adapter"] = FIRST | section
    file.write_text(tomli_w.dumps(content))
    shutil.rmtree(out / "adapter")
    state = json.loads((out / STEP / "state.json").read_text())
    del state["adapter"], state["format_version"]
    (out / STEP / "state.json").write_text(json.dumps(state))
    manifest = json.loads((out / STEP / "manifest.json").read_text())
    manifest["sha256"]["state.json"] = file_sha256(out / STEP / "state.json")
    (out / STEP / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_an_old_runs_t2i_adapter(root, tmp_path, exponent):
    section = {"method": "t2i", "noise_exponent": exponent}
    changes = {f"adapter__{name}": value for name, value in section.items()}
    run(root, tmp_path / "out", **changes, base__path=str(root / "sd15"))
    as_of_old(tmp_path / "out", section)
    adapter = load_adapter(tmp_path / "out")
    assert isinstance(adapter, T2IAdapter)
    weights = load_file(tmp_path / "out" / STEP / "module.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter.state_dict().items())
    assert adapter.config.get("noise_exponent", 0.0) == exponent


def test_an_old_runs_controlnet_says_what_to_use(root, tmp_path):
    """Its checkpoint alone does not show its shape."""
    run(root, tmp_path / "out", adapter__method="controlnet")
    as_of_old(tmp_path / "out", {"method": "controlnet"})
    with refused("adapter", str(tmp_path / "out"), hint="adapter of the finished run"):
        load_adapter(tmp_path / "out")


def test_a_run_says_which_version_its_files_have(root, tmp_path):
    run(root, tmp_path / "out")
    assert tomllib.loads((tmp_path / "out" / "config.toml").read_text())["format_version"] == 2
    state = json.loads((tmp_path / "out" / STEP / "state.json").read_text())
    assert state["format_version"] == 2
    assert state["adapter"]["_class_name"] == "NexusAdapter"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_base_that_lacks_a_part_is_refused_before_any_work(root, tmp_path, capsys, part):
    base = shutil.copytree(root / "base", tmp_path / "base")
    shutil.rmtree(base / part)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_config(config(root, tmp_path / "out", base__path=str(base))))
    for argv in (["train", str(recipe)], ["train", str(recipe), "--dry-run"]):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("nexus train: error: base.path: ")
        assert part in line
        assert str(base) in line
    assert not (tmp_path / "out").exists()
