"""Denoisers that are wrapped, subclassed, compiled or copied: what the hook finds and refuses."""

import copy
import functools
import pickle
from inspect import signature

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases.families import inner
from nexus_adapters.injection import Control, attach
from nexus_adapters.injection.denoiser_hook import _ModuleHook, parameter_names

# Compiling takes as long as a UNet is deep.
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def generate(pipe, **options):
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": tiny.generators(1)[0]}
    return pipe("a red star", height=64, width=64, **given | options).images


class PassesAll(UNet2DConditionModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class PassesRest(UNet2DConditionModel):
    def forward(self, sample, timestep, *args, **kwargs):
        return super().forward(sample, timestep, *args, **kwargs)


class Keywords(PassesAll):
    def forward(self, sample, *, timestep=0, **kwargs):
        return super().forward(sample, timestep, **kwargs)


class Decorated(UNet2DConditionModel):
    @functools.wraps(UNet2DConditionModel.forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [PassesAll, PassesRest, Decorated])
def test_a_forward_that_passes_its_arguments_on(kind):
    expected = parameter_names(tiny.unet())
    torch.manual_seed(0)
    unet = kind(**tiny.SD15_UNET).eval()
    assert parameter_names(unet) == expected
    own, stock = tiny.sd15(unet=unet), tiny.sd15()
    control = Control(tiny.adapter(stock.unet), tiny.condition())
    with attach(own, control), attach(stock, control):
        assert torch.equal(generate(own), generate(stock))


def test_a_forward_of_keywords():
    assert set(parameter_names(Keywords(**tiny.SD15_UNET))) == set(parameter_names(tiny.unet()))


def test_a_forward_that_leads_nowhere_is_refused():
    class UNet2DConditionModel(torch.nn.Module):
        config = tiny.unet().config

        def forward(self, *args, **kwargs):
            return args

    adapter = tiny.adapter(tiny.unet())
    with refused("pipe_or_denoiser", expected="down_intrablock_additional_residuals"):
        attach(UNet2DConditionModel(), Control(adapter, tiny.condition(), policy="per_branch"))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_unet_wrapped_by_peft(compiled):
    pipe = tiny.sd15()
    adapter = tiny.adapter(pipe.unet)
    bare = pipe.unet
    config = peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(pipe.unet, config).eval()
    with attach(tiny.sd15(unet=bare), Control(adapter, tiny.condition(), policy="per_branch")):
        expected = generate(tiny.sd15(unet=bare))
    pipe.unet = torch.compile(wrapped, backend="eager") if compiled else wrapped
    assert inner(pipe.unet) is bare
    base = None if compiled else generate(pipe)
    for target, policy in ((pipe, "per_branch"), (pipe, "positive"), (pipe.unet, "per_branch")):
        if compiled and policy == "positive":
            continue
        with attach(target, Control(adapter, tiny.condition(), policy=policy)):
            found = generate(pipe)
        assert torch.allclose(found, expected, atol=1e-5) == (policy == "per_branch")
    if base is not None:
        assert torch.equal(generate(pipe), base)


class Short(UNet2DConditionModel):
    """Compiled in no time."""

    def forward(self, sample, timestep, encoder_hidden_states, down_intrablock_additional_residuals=None):
        features = down_intrablock_additional_residuals or [0.0]
        return self.conv_out(self.conv_in(sample) + features[0])


def compiled(unet, form):
    if form == "wrapper":
        return torch.compile(unet, backend="eager", fullgraph=True)
    unet.compile(backend="eager", fullgraph=True)
    return unet


@pytest.mark.parametrize("form", ["wrapper", "module"])
def test_compiled_while_attached(form):
    """The compiler leaves the hook out, so that the controls act, and then no longer."""
    torch.compiler.reset()
    unet = Short(**tiny.SD15_UNET).eval()
    inputs = torch.ones(1, 4, 8, 8), 1, torch.ones(1, 5, tiny.TEXT_WIDTH)
    with torch.no_grad():
        base = unet(*inputs)
        with attach(unet, Control(tiny.adapter(unet), tiny.condition(), policy="per_branch")):
            expected = unet(*inputs)
            later = compiled(unet, form)
            for _ in range(2):
                assert torch.allclose(later(*inputs), expected, atol=1e-6)
        assert torch.allclose(later(*inputs), base, atol=1e-6)
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.skipif("reason" not in signature(torch.compiler.disable).parameters, reason="needs torch 2.7")
def test_the_compiler_can_say_why_it_leaves_the_hook_out():
    for hooked in (_ModuleHook.__call__, _ModuleHook.after):
        assert "attached controls" in hooked._torchdynamo_disable_msg


@pytest.mark.full
@pytest.mark.parametrize("form", ["wrapper", "module"])
def test_a_pipelines_unet_compiled_while_attached(form):
    torch.compiler.reset()
    pipe = tiny.sd15(unet=tiny.unet(**TWO_LEVELS))
    base = generate(pipe)
    with attach(pipe, Control(tiny.adapter(pipe.unet), tiny.condition(), end=0.9)):
        expected = generate(pipe)
        pipe.unet = compiled(pipe.unet, form)
        assert torch.allclose(generate(pipe), expected, atol=1e-5)
    assert torch.allclose(generate(pipe), base, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_attached_denoiser_is_not_copied(copied):
    pipe = tiny.sd15(unet=tiny.unet(**TWO_LEVELS))
    with attach(pipe, Control(tiny.adapter(pipe.unet), tiny.condition())):
        for whole in (pipe, pipe.unet):
            with pytest.raises(RuntimeError, match=r"with attached controls .* remove them first"):
                copied(whole)
    assert copied(pipe.unet) is not None
