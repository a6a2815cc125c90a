"""Whole runs on a tiny base: what comes out, and that every field of a recipe has an effect."""

import json

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.methods.built import build
from tests.refusals import refused
from tests.training.runs import LONG, config, run, same_to_the_bit, stopped_after, write_images

from nexus_adapters import Control, NexusAdapter
from nexus_adapters.bases.base import Base
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.methods import METHODS
from nexus_adapters.methods.controlnet_xs import ReshapedControlNetXS
from nexus_adapters.training import run as module
from nexus_adapters.training.loop import Stopped
from nexus_adapters.training.recipe import load_recipe, load_run_recipe
from nexus_adapters.training.run import dry_run

WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, images, and a cache that runs share."""
    root = tmp_path_factory.mktemp("training")
    tiny.sd15().save_pretrained(root / "base")
    write_images(root / "images")
    return root


@pytest.fixture(scope="module")
def reference(root):
    """A run that was never stopped."""
    out = root / "reference"
    run(root, out)
    return out


def for_xs(method):
    """What a tiny ControlNet-XS needs: other methods have no such option."""
    return {"adapter__size_ratio": 1.0, "data__resolution": 128} if method == "controlnet-xs" else {}


def weights(out):
    return load_file(out / WEIGHTS)


def same_weights(a, b):
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_adapter_loads_and_has_learned(root, reference):
    adapter = NexusAdapter.from_pretrained(reference / "adapter")
    assert (adapter.variant, adapter.config.residual) == ("prime", True)
    assert {tensor.dtype for tensor in weights(reference).values()} == {torch.float32}
    torch.manual_seed(0)
    untrained = NexusAdapter.for_unet(tiny.unet(), "prime").state_dict()
    assert untrained.keys() == adapter.state_dict().keys()
    moved = [
        name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, untrained[name])
    ]
    assert len(moved) == len(untrained)  # gradients reach all of it


def test_the_recipe_is_stored_whole(root, reference):
    assert load_run_recipe(reference / "config.toml") == config(root, reference)
    assert load_recipe(reference / "config.toml") == config(root, reference)


def test_the_same_recipe_gives_the_same_weights(root, reference, tmp_path):
    run(root, tmp_path / "out")
    assert same_weights(tmp_path / "out", reference)


def test_a_finished_run_is_left_as_it_is(root, reference, monkeypatch, capsys):
    before = files(reference)
    monkeypatch.setattr(module, "load_encoders", lambda *_: 1 / 0)
    assert run(root, reference) == reference / "adapter"
    assert files(reference) == before
    assert "finished after 4 steps" in capsys.readouterr().err


def test_the_card_says_how_it_came_about_and_its_code_runs(root, reference):
    card = (reference / "adapter" / "README.md").read_text()
    for expected in ("library_name: diffusers", "4 steps", "14 samples", "learning_rate = 0.01", "torch "):
        assert expected in card
    assert str(root) not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace('"base"', repr(str(root / "base"))).replace(
        "path/to/adapter", str(reference / "adapter")
    )
    code = code.replace('"a prompt"', '"a prompt", num_inference_steps=1')
    known = {"condition": tiny.image()}
    exec(code, known)
    assert isinstance(known["image"], Image.Image)


def test_t2i_trains_too(root, tmp_path):
    adapter = T2IAdapter.from_pretrained(run(root, tmp_path / "out", adapter__method="t2i"))
    assert adapter.config.channels == list(tiny.SD15_UNET["block_out_channels"])


@pytest.mark.parametrize("method", ["t2i", "prime-paper"])
def test_a_noise_exponent_goes_with_the_adapter(root, tmp_path, method):
    """In its config, a T2I-Adapter's too, which diffusers keeps and `Control` reads."""
    changes = {"adapter__method": method, "adapter__noise_exponent": 0.5}
    out = run(root, tmp_path / "out", validation__every_steps=2, validation__images=1, **changes)
    adapter = (T2IAdapter if method == "t2i" else NexusAdapter).from_pretrained(out)
    assert Control(adapter, tiny.condition()).noise_exponent == 0.5
    assert Control(adapter, tiny.condition(), noise_exponent=0).noise_exponent == 0


@pytest.mark.parametrize("method", ["t2i", "prime", "prime-paper", "controlnet", "controlnet-xs"])
def test_every_method_trains_and_draws_in_bfloat16(root, tmp_path, method):
    changes = {"adapter__method": method, "training__mixed_precision": "bf16"} | for_xs(method)
    run(root, tmp_path / "out", validation__every_steps=2, validation__images=1, **changes)
    said = dry_run(config(root, tmp_path / "dry", **changes))
    assert "bfloat16" in said or "bf16" in said


@pytest.mark.parametrize("is_sdxl", [False, True])
def test_controlnet_trains_too(root, tmp_path, is_sdxl):
    """A copy of the UNet's half whose zero layers let it begin as the base: after steps it no longer is."""
    changes = {
        "adapter__method": "controlnet",
        "validation__every_steps": 2,
        "validation__images": 1,
        "training__gradient_checkpointing": True,
    }
    if is_sdxl:
        tiny.sdxl().save_pretrained(tmp_path / "sdxl")
        changes["base__path"] = str(tmp_path / "sdxl")
    out = run(root, tmp_path / "out", **changes)
    controlnet = ControlNetModel.from_pretrained(out)
    unet = UNet2DConditionModel.from_pretrained(changes.get("base__path", root / "base"), subfolder="unet")
    trained, start = controlnet.state_dict(), unet.state_dict()
    assert not torch.equal(trained["conv_in.weight"], start["conv_in.weight"])
    assert trained["controlnet_mid_block.weight"].abs().sum() > 0
    assert all(row["loss"] > 0 for row in rows(tmp_path / "out") if "loss" in row)
    assert any("structure_score" in row for row in rows(tmp_path / "out"))
    assert "ControlNet for canny" in (out / "README.md").read_text()


@pytest.mark.parametrize("is_sdxl", [False, True])
def test_controlnet_xs_trains_too(root, tmp_path, is_sdxl):
    changes = {
        "data__resolution": 128,  # or the deepest level has one pixel, which the norms refuse
        "adapter__method": "controlnet-xs",
        "adapter__size_ratio": 1.0,
        "training__ema_decay": 0.5,
        "training__gradient_checkpointing": True,
        "validation__every_steps": 2,
        "validation__images": 1,
    }
    if is_sdxl:
        tiny.sdxl().save_pretrained(tmp_path / "sdxl")
        changes["base__path"] = str(tmp_path / "sdxl")
    out = run(root, tmp_path / "out", **changes)
    adapter = ReshapedControlNetXS.from_pretrained(out)
    assert adapter.control_to_base_for_conv_in.weight.abs().sum() > 0  # it started at zero
    assert all(row["loss"] > 0 for row in rows(tmp_path / "out") if "loss" in row)
    assert any("structure_score" in row for row in rows(tmp_path / "out"))
    assert "ControlNet-XS for canny" in (out / "README.md").read_text()
    goes_on = changes | {"adapter__start_from": str(out)}
    again = ReshapedControlNetXS.from_pretrained(run(root, tmp_path / "again", **goes_on))
    assert not torch.equal(again.conv_in.weight, adapter.conv_in.weight)


@pytest.mark.parametrize("method", ["controlnet", "controlnet-xs"])
def test_a_controlnets_card_shows_code_that_runs(root, tmp_path, method):
    out = run(root, tmp_path / "out", **{"adapter__method": method, "data__resolution": 128} | for_xs(method))
    text = (out / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert 'load_base("base")' in code  # the folder's last part alone
    code = code.replace('"base"', repr(str(root / "base"))).replace('"path/to/adapter"', repr(str(out)))
    code = code.replace('"a prompt"', '"a prompt", num_inference_steps=1')
    known = {"condition": tiny.image()}
    exec(code, known)
    assert isinstance(known["image"], Image.Image)


def test_sdxl_trains_too(root, tmp_path):
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    changes = {"base__path": str(tmp_path / "sdxl"), "validation__every_steps": 2, "validation__images": 1}
    adapter = NexusAdapter.from_pretrained(run(root, tmp_path / "out", **changes))
    assert adapter.config.text_width == 2 * tiny.TEXT_WIDTH
    assert all(row["loss"] > 0 for row in rows(tmp_path / "out") if "loss" in row)


@pytest.fixture(scope="module")
def long_run(root, tmp_path_factory):
    write_images(root / "more", count=33)
    out = tmp_path_factory.mktemp("long") / "out"
    run(root, out, data__path=str(root / "more"), **LONG)
    return out


@pytest.mark.parametrize("step", range(24))
def test_stopped_at_any_step_and_continued_is_never_stopped(root, tmp_path, long_run, monkeypatch, step):
    """Weights, optimizer, and the samples that every later step reads."""
    out = tmp_path / "out"
    options = {"data__path": str(root / "more"), **LONG}
    if step < 23:  # in the last one nothing is left to stop
        with monkeypatch.context() as patch:
            patch.setattr(module, "train", stopped_after(step))
            with pytest.raises(Stopped):
                run(root, out, **options)
    run(root, out, **options)
    assert same_weights(out, long_run)
    assert same_to_the_bit(out, long_run, 24)


def test_live_encoding_trains_on_the_same_samples(root, reference, tmp_path):
    """Not to the bit: a cache rounds to half precision."""
    run(root, tmp_path / "out", cache__enabled=False)
    ours, theirs = rows(tmp_path / "out"), rows(reference)
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0.02)
    assert [row["loss"] for row in ours] != [row["loss"] for row in theirs]


def test_the_encoders_leave_memory_when_the_cache_is_full(root, tmp_path, monkeypatch):
    released = []
    real = Base.release
    monkeypatch.setattr(Base, "release", lambda self: released.append(1) or real(self))
    run(root, tmp_path / "a")
    assert released == [1]
    run(root, tmp_path / "b", cache__enabled=False)
    assert released == [1]


def test_gradients_reach_the_adapter_alone_through_checkpointing(root, reference, tmp_path, monkeypatch):
    seen = {}
    real = module.build_optimizer

    def build(options, adapter):
        seen["optimizer"], seen["adapter"] = real(options, adapter), adapter
        return seen["optimizer"]

    load = module.load_denoiser
    monkeypatch.setattr(module, "build_optimizer", build)
    monkeypatch.setattr(module, "load_denoiser", lambda *args: seen.setdefault("unet", load(*args)))
    run(root, tmp_path / "out", training__gradient_checkpointing=True)
    assert seen["unet"].is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in seen["unet"].parameters())
    assert not any(parameter.requires_grad for parameter in seen["unet"].parameters())
    assert all(parameter.grad is not None for parameter in seen["adapter"].parameters())
    trained = {id(p) for group in seen["optimizer"].param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in seen["adapter"].parameters()}
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.allclose(tensor, weights(reference)[name], atol=1e-4), name


@pytest.mark.parametrize("key", ["loss.min_snr_gamma", "adapter.noise_exponent"])
@pytest.mark.parametrize("work", [run, lambda *args, **given: dry_run(config(*args, **given))])
def test_what_a_bases_schedule_does_not_have_is_refused_before_any_work(
    root, tmp_path, monkeypatch, key, work
):
    """As of a base that is trained by flow matching."""
    monkeypatch.setattr(UNetBase, "loss_weights", Base.loss_weights)
    monkeypatch.setattr(UNetBase, "noise_factors", Base.noise_factors)
    monkeypatch.setattr(module, "load_encoders", lambda *_: 1 / 0)
    with refused(key, "0.5", expected="0 for a UNetBase"):
        work(root, tmp_path / "out", **{key.replace(".", "__"): 0.5})
    assert not (tmp_path / "out").exists()
    dry_run(config(root, tmp_path / "out", **{key.replace(".", "__"): 0.0}))


def test_fading_features_of_a_start_need_a_schedule_too(root, tmp_path, monkeypatch):
    build("t2i", noise_exponent=0.5).save_pretrained(tmp_path / "start")
    monkeypatch.setattr(UNetBase, "noise_factors", Base.noise_factors)
    changes = {"adapter__method": "t2i", "adapter__start_from": str(tmp_path / "start")}
    with refused("adapter.noise_exponent", "0.5", expected="0 for a UNetBase"):
        run(root, tmp_path / "out", **changes)


def test_a_base_of_the_package_has_no_revision(root, tmp_path):
    with refused("base.revision", "'main'", expected="'embedded'"):
        run(root, tmp_path / "out", base={"path": "embedded", "revision": "main"})


@pytest.mark.parametrize("method", list(METHODS))
def test_a_dry_run_describes_every_method(root, tmp_path, method):
    said = dry_run(config(root, tmp_path / "out", adapter__method=method, **for_xs(method)))
    assert said.startswith(f"adapter      {method}, ")
    assert "activations of 2 samples 0.0" in said
