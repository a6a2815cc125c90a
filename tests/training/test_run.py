"""Whole runs on a tiny base: what each method gives, and that a resumed run is as an uninterrupted one."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused
from tests.training.runs import (
    LONG,
    SMALL_UNET,
    config,
    run,
    same_to_the_bit,
    stopped_in,
    weightless,
)

from nexus_adapters import Control, NexusAdapter
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.conditions import EXTRACTORS, Extractor, register_condition
from nexus_adapters.methods import METHODS
from nexus_adapters.methods.controlnet_xs import ReshapedControlNetXS
from nexus_adapters.training.config import ValidationOptions
from nexus_adapters.training.loop import Stopped
from nexus_adapters.training.recipe import load_recipe, load_run_recipe
from nexus_adapters.training.run import dry_run

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS = f"adapter/{WEIGHTS_NAME}"
REFERENCE = {"training__max_train_steps": 4, "log__every_steps": 1}
VALIDATED = {"validation__every_steps": 2, "validation__images": 1}


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(root, out, **REFERENCE)
    return out


def for_method(method):
    """A recipe's changes: a T2I-Adapter needs four levels; only ControlNet-XS has a size ratio."""
    others = {
        "t2i": {"base__path": "{root}/sd15"},
        "controlnet-xs": {"adapter__size_ratio": 1.0},
    }
    return {"adapter__method": method} | others.get(method, {})


def at(root, changes):
    return {key: value.format(root=root) if key == "base__path" else value for key, value in changes.items()}


def weights(out):
    return load_file(out / WEIGHTS)


def same_weights(a, b):
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_adapter_loads_and_has_learned(reference):
    adapter = NexusAdapter.from_pretrained(reference / "adapter")
    assert (adapter.variant, adapter.config.residual) == ("prime", True)
    assert {tensor.dtype for tensor in weights(reference).values()} == {torch.float32}
    torch.manual_seed(0)
    untrained = NexusAdapter.for_unet(tiny.unet(**SMALL_UNET), "prime").state_dict()
    assert untrained.keys() == adapter.state_dict().keys()
    same = [name for name, tensor in adapter.state_dict().items() if torch.equal(tensor, untrained[name])]
    assert same == []  # gradients reach all of it


def test_the_recipe_is_stored_whole(root, reference):
    expected = config(root, reference, **REFERENCE)
    assert load_run_recipe(reference / "config.toml") == load_recipe(reference / "config.toml") == expected


def test_the_same_recipe_gives_the_same_weights(root, reference, tmp_path):
    run(root, tmp_path / "out", **REFERENCE)
    assert same_weights(tmp_path / "out", reference)


def test_a_finished_run_is_left_as_it_is(root, tmp_path, capsys):
    """Without its base, too: nothing is loaded."""
    base = weightless(root / "base", tmp_path / "base")
    for file in (root / "base").rglob("*.safetensors"):
        (base / file.relative_to(root / "base")).write_bytes(file.read_bytes())
    out, changes = tmp_path / "out", {"base__path": str(base), "training__max_train_steps": 1}
    run(root, out, **changes)
    before = files(out)
    base.rename(tmp_path / "gone")
    capsys.readouterr()
    assert run(root, out, **changes) == out / "adapter"
    assert files(out) == before
    assert "finished after 1 steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of one step that could have more."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(root, out, training__schedule="constant", training__max_train_steps=1)
    return out


@pytest.mark.parametrize("version", ["this", "an earlier one"])
def test_a_finished_adapter_without_checkpoints_is_not_trained_over(root, finished, tmp_path, version):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "checkpoints")
    if version != "this":
        (out / "progress.json").unlink()
    before = files(out)
    for work in (run, check):
        with refused("output_dir", "no checkpoints although it was saved at step 1", hint="start_from"):
            work(root, out, training__schedule="constant", training__max_train_steps=2)
    assert files(out) == before


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


SPOILED = {
    "half a record": lambda folder: (folder / "training.json").write_text('{"steps": 1'),
    "another record": lambda folder: (folder / "training.json").write_text("[]"),
    "no weights": lambda folder: (folder / WEIGHTS_NAME).unlink(),
    "empty weights": lambda folder: (folder / WEIGHTS_NAME).write_bytes(b""),
    "half the weights": lambda folder: os.truncate(folder / WEIGHTS_NAME, 4000),
    "other weights": lambda folder: flip_a_bit(folder / WEIGHTS_NAME),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text('{"groups": 1'),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_adapter_is_given_again_by_the_last_checkpoint(root, finished, tmp_path, kind):
    out = shutil.copytree(finished, tmp_path / "out")
    SPOILED[kind](out / "adapter")
    with pytest.warns(UserWarning, match="adapter' is damaged and will be written again"):
        run(root, out, training__schedule="constant", training__max_train_steps=1)
    assert same_weights(out, finished)
    assert json.loads((out / "adapter" / "training.json").read_text())["steps"] == 1
    shutil.rmtree(out / "checkpoints")
    SPOILED[kind](out / "adapter")
    with refused("output_dir", "no checkpoints"):
        run(root, out, training__schedule="constant", training__max_train_steps=1)


def check_code_of_card(card, root, out):
    """The code that a model card shows, with the machine's folders put in, gives an image."""
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 'load_base("base")' in code  # the folder's last part alone
    code = code.replace('"base"', repr(str(root / "base"))).replace("path/to/adapter", str(out))
    code = code.replace('"a prompt"', '"a prompt", num_inference_steps=1')
    known = {"condition": tiny.image()}
    exec(code, known)
    assert isinstance(known["image"], Image.Image)


def test_the_card_says_how_it_came_about_and_its_code_runs(root, reference):
    card = (reference / "adapter" / "README.md").read_text()
    for expected in ("library_name: diffusers", "4 steps", "14 samples", "learning_rate = 0.01", "torch "):
        assert expected in card
    assert str(root) not in card
    check_code_of_card(card, root, reference / "adapter")


@pytest.mark.parametrize("method", ["t2i", "prime-paper"])
def test_a_noise_exponent_goes_with_the_adapter(root, tmp_path, method):
    """In its config, a T2I-Adapter's too, which diffusers keeps and `Control` reads."""
    changes = at(root, for_method(method)) | VALIDATED | {"adapter__noise_exponent": 0.5}
    out = run(root, tmp_path / "out", **changes, validation__samples=1)
    adapter = (T2IAdapter if method == "t2i" else NexusAdapter).from_pretrained(out)
    assert Control(adapter, tiny.condition()).noise_exponent == 0.5
    assert Control(adapter, tiny.condition(), noise_exponent=0).noise_exponent == 0
    if method == "t2i":
        assert adapter.config.channels == list(tiny.SD15_UNET["block_out_channels"])


SOME = ["prime", "controlnet-xs"]
OTHERS = [pytest.param(method, marks=pytest.mark.full) for method in METHODS if method not in SOME]


@pytest.mark.parametrize("method", SOME + OTHERS)
def test_every_method_trains_and_generates_in_bfloat16(root, tmp_path, method):
    changes = at(root, for_method(method)) | {"training__mixed_precision": "bf16"}
    run(root, tmp_path / "out", **changes, **VALIDATED, training__max_train_steps=1, validation__samples=1)
    assert (tmp_path / "out" / "images" / "step-00000001.png").is_file()
    assert "bfloat16" in dry_run(config(root, tmp_path / "dry", **changes))


def scored(root, out, scores, **changes):
    """A run whose validations score as given. SystemExit where it needs another one."""
    left = iter(scores)

    def agreement(found, wanted):
        if (score := next(left, None)) is None:
            raise SystemExit
        return score

    with EXTRACTORS.temporary():
        kind = {"kind": "image", "agreement": agreement}
        register_condition(Extractor("scored-in-test-run", lambda image: image, "The image.", **kind))
        changes = {"training__schedule": "constant", "checkpoint__every_steps": 5, **changes}
        changes |= {"validation__every_steps": 1, "validation__images": 1, "checkpoint__keep": 1}
        return run(root, out, **changes, data__condition="scored-in-test-run", training__max_train_steps=6)


def test_early_stopping_gives_the_best_weights(root, tmp_path):
    """Which an interrupted run has kept, though no checkpoint was due."""
    out, scores = tmp_path / "out", [0.9, 0.5, 0.1]
    changes = {"validation__early_stop_patience": 2, "training__ema_decay": 0.5}
    with pytest.raises(SystemExit):
        scored(root, out, scores[:2], **changes)
    scored(root, out, scores[1:], **changes)
    record = json.loads((out / "adapter/training.json").read_text())
    assert (record["steps"], record["weights_of_step"], record["stopped_early"]) == (3, 1, True)
    average = load_file(out / "checkpoints/step-00000001/average.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in weights(out).items())
    assert "weights of step 1" in (out / "adapter/README.md").read_text()
    sheet = (out / "images/step-00000001.png").read_bytes()
    assert (out / "adapter/samples.png").read_bytes() == sheet


def test_the_last_weights_where_the_best_are_damaged(root, tmp_path):
    """In a run that has ended, and whose adapter is lost."""
    out, changes = tmp_path / "out", {"validation__early_stop_patience": 1}
    scored(root, out, [0.9, 0.5], **changes)
    assert json.loads((out / "adapter/training.json").read_text())["weights_of_step"] == 1
    shutil.rmtree(out / "adapter")
    (out / "checkpoints/step-00000001/module.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="instead of the best, .*step-00000001"):
        scored(root, out, [], **changes)
    assert json.loads((out / "adapter/training.json").read_text())["weights_of_step"] == 2
    last = load_file(out / "checkpoints/step-00000002/module.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(out).items())


@pytest.mark.parametrize(
    ("options", "selects_best"),
    [
        ({}, False),
        ({"early_stop_patience": 1}, True),
        ({"early_stop_patience": 1, "select": "last"}, False),
        ({"select": "best"}, True),
        ({"early_stop_patience": 1, "select": "best"}, True),
    ],
)
def test_which_weights_a_run_results_in(options, selects_best):
    assert ValidationOptions(**options).selects_best == selects_best


def test_a_diverged_run_is_exported_with_a_warning(root, tmp_path):
    """And all that it says of itself can be read."""
    out, changes = tmp_path / "out", {"training__learning_rate": 1e20, "log__every_steps": 1}
    with pytest.warns(UserWarning, match="the run diverged"), np.errstate(invalid="ignore"):
        run(root, out, **VALIDATED, **changes, training__max_train_steps=3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(out).values())
    assert "| 3 | not finite |" in (out / "adapter" / "README.md").read_text()
    before = files(out)
    with pytest.warns(UserWarning, match="the run diverged"):
        run(root, out, **VALIDATED, **changes, training__max_train_steps=3)
    assert files(out) == before


@pytest.fixture(params=["sd", pytest.param("sdxl", marks=pytest.mark.full)], scope="module")
def family(request, root, tmp_path_factory):
    """The folder of a base of each family that ControlNets are made for."""
    if request.param == "sd":
        return root / "base"
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    tiny.sdxl().save_pretrained(folder)
    return folder


def test_controlnet_trains_too(root, tmp_path, family):
    """A copy of the UNet's half whose zero layers let it begin as the base: after steps it no longer is."""
    changes = for_method("controlnet") | VALIDATED | {"log__every_steps": 1, "base__path": str(family)}
    out = run(root, tmp_path / "out", **changes, training__gradient_checkpointing=True)
    trained = ControlNetModel.from_pretrained(out).state_dict()
    start = UNet2DConditionModel.from_pretrained(family, subfolder="unet").state_dict()
    assert not torch.equal(trained["conv_in.weight"], start["conv_in.weight"])
    assert trained["controlnet_mid_block.weight"].abs().sum() > 0
    check_log(tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "ControlNet for canny" in card
    check_code_of_card(card, family.parent, out)


def check_log(out):
    assert all(row["loss"] > 0 for row in rows(out) if "loss" in row)
    assert [row["step"] for row in rows(out) if "structure_score" in row] == [2]


def test_controlnet_xs_trains_too(root, tmp_path, family):
    changes = for_method("controlnet-xs") | VALIDATED | {"log__every_steps": 1, "base__path": str(family)}
    changes |= {"training__ema_decay": 0.5, "training__gradient_checkpointing": True}
    out = run(root, tmp_path / "out", **changes)
    adapter = ReshapedControlNetXS.from_pretrained(out)
    assert adapter.control_to_base_for_conv_in.weight.abs().sum() > 0  # it started at zero
    check_log(tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "ControlNet-XS for canny" in card
    check_code_of_card(card, family.parent, out)
    changes |= {"adapter__start_from": str(out), "validation__every_steps": 0, "log__every_steps": 1000}
    again = ReshapedControlNetXS.from_pretrained(run(root, tmp_path / "again", **changes))
    assert not torch.equal(again.conv_in.weight, adapter.conv_in.weight)


def test_sdxl_trains_too(root, tmp_path):
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    changes = VALIDATED | {"base__path": str(tmp_path / "sdxl"), "log__every_steps": 1}
    adapter = NexusAdapter.from_pretrained(run(root, tmp_path / "out", **changes))
    assert adapter.config.text_width == 2 * tiny.TEXT_WIDTH
    check_log(tmp_path / "out")


@pytest.fixture(scope="module")
def long_run(root, watched, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "out"
    run(root, out, **LONG)
    return out


@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=[] if s in (0, 6, 11) else pytest.mark.full) for s in range(12)]
)
def test_stopped_at_any_step_and_resumed_is_never_stopped(root, tmp_path, watched, long_run, step):
    """Weights, optimizer, and the samples that every later step reads."""
    out = tmp_path / "out"
    with stopped_in(watched, step):
        if step < 11:  # in the last one nothing is left to stop
            with pytest.raises(Stopped):
                run(root, out, **LONG)
        else:
            run(root, out, **LONG)
    run(root, out, **LONG)
    assert same_weights(out, long_run)
    assert same_to_the_bit(out, long_run, 12)


def test_live_encoding_trains_on_the_same_samples(root, reference, tmp_path):
    """Not to the bit: a cache rounds to half precision."""
    run(root, tmp_path / "out", **REFERENCE, cache__enabled=False)
    ours, theirs = rows(tmp_path / "out"), rows(reference)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0.02)
    assert [row["loss"] for row in ours] != [row["loss"] for row in theirs]


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_encoders_leave_memory_when_the_cache_is_full(root, tmp_path, watched, is_cached):
    changes = {"adapter__method": "watched", "cache__enabled": is_cached, "training__max_train_steps": 1}
    run(root, tmp_path / "out", **changes)
    assert (watched.base.pipe is None) == is_cached


def test_gradients_reach_the_adapter_alone_through_checkpointing(root, reference, tmp_path, watched):
    changes = REFERENCE | {"adapter__method": "watched", "training__gradient_checkpointing": True}
    run(root, tmp_path / "out", **changes)
    assert watched.denoiser.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in watched.denoiser.parameters())
    assert not any(parameter.requires_grad for parameter in watched.denoiser.parameters())
    assert all(parameter.grad is not None for parameter in watched.adapter.parameters())
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.allclose(tensor, weights(reference)[name], atol=1e-4), name


@pytest.fixture
def flow(monkeypatch):
    """UNets count as trained by flow matching, whose schedule weighs neither losses nor features."""
    monkeypatch.setattr(UNetBase, "loss_weights", Base.loss_weights)
    monkeypatch.setattr(UNetBase, "noise_factors", Base.noise_factors)


def check(root, out, **changes):
    return dry_run(config(root, out, **changes))


@pytest.mark.parametrize("key", ["loss.min_snr_gamma", "adapter.noise_exponent"])
@pytest.mark.parametrize("work", [run, check])
def test_what_a_bases_schedule_does_not_have_is_refused_before_any_work(root, tmp_path, flow, key, work):
    base = weightless(root / "base", tmp_path / "base")
    changes = {"base__path": str(base), key.replace(".", "__"): 0.5}
    with refused(key, "0.5", expected="0 for UNetBase"):
        work(root, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    check(root, tmp_path / "out", **changes | {key.replace(".", "__"): 0.0})


def test_fading_features_of_a_start_need_a_schedule_too(root, tmp_path, flow):
    build("t2i", noise_exponent=0.5).save_pretrained(tmp_path / "start")
    changes = at(root, for_method("t2i")) | {"adapter__start_from": str(tmp_path / "start")}
    with refused("adapter.noise_exponent", "0.5", expected="0 for UNetBase"):
        run(root, tmp_path / "out", **changes)


def test_a_model_that_cannot_be_fetched_is_named_by_its_key(root, tmp_path):
    """Which a dry run does not ask the Hub for."""
    changes = {"data__condition": "depth", "data__extractor": {"model": "nobody/has-this-model"}}
    with refused("data.extractor.model", "nobody/has-this-model"):
        run(root, tmp_path / "out", **changes)


def test_a_base_of_the_package_has_no_revision(root, tmp_path):
    with refused("base.revision", "'main'", expected="'embedded'"):
        run(root, tmp_path / "out", base={"path": "embedded", "revision": "main"})


@pytest.mark.parametrize("method", SOME + OTHERS)
def test_a_dry_run_describes_every_method(root, tmp_path, method):
    said = check(root, tmp_path / "out", **at(root, for_method(method)))
    assert said.startswith(f"adapter      {method}, ")
    assert "activations for 2 samples 0.0" in said
