"""Rows, guidance branches and conditions: who reads what."""

import inspect

import diffusers
import pytest
import torch
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases.base import CallingPipeline, CallLayout
from nexus_adapters.bases.unet import UNetBase
from nexus_adapters.bases.unet_pipelines import KNOWN_PIPELINES
from nexus_adapters.injection.branches import BranchPlan, call_layout, check_policy, plan_branches

GUIDED = (False, True)
BASE = UNetBase(tiny.SD15_UNET)


def plan(policy, branches, rows, conditions, called=None):
    return plan_branches(policy, CallLayout(torch.zeros(rows, 1, 1), branches, called), conditions)


def branches_of(pipe, policy, rows=2, **variables):
    calling = CallingPipeline(pipe, variables)
    return call_layout(BASE, calling, policy, torch.zeros(rows, 1, 1)).branches


@pytest.mark.parametrize(
    ("policy", "branches", "rows", "conditions", "expected"),
    [
        # one prompt, guided
        ("positive", GUIDED, 2, 1, BranchPlan(1, 1, 1, 1, (1.0, 1.0))),
        ("cond_only", GUIDED, 2, 1, BranchPlan(1, 1, 1, 1, (0.0, 1.0))),
        ("per_branch", GUIDED, 2, 1, BranchPlan(0, 2, 2, 1, (1.0,))),
        ("per_branch", GUIDED, 1, 1, BranchPlan(0, 1, 1, 1, (1.0,))),  # branches that run apart
        # three prompts of two images each, with a condition for each prompt
        ("positive", GUIDED, 12, 3, BranchPlan(6, 6, 2, 1, (1.0, 1.0))),
        ("per_branch", GUIDED, 12, 3, BranchPlan(0, 12, 2, 2, (1.0,))),
        # not guided
        ("positive", (True,), 6, 3, BranchPlan(0, 6, 2, 1, (1.0,))),
        ("cond_only", (True,), 6, 3, BranchPlan(0, 6, 2, 1, (1.0,))),
        # InstructPix2Pix, and perturbed attention
        ("positive", (True, False, False), 6, 2, BranchPlan(0, 2, 1, 1, (1.0, 1.0, 1.0))),
        ("cond_only", (True, False, False), 6, 2, BranchPlan(0, 2, 1, 1, (1.0, 0.0, 0.0))),
        ("cond_only", (False, True, True), 6, 1, BranchPlan(2, 2, 2, 1, (0.0, 1.0, 1.0))),
        # layout unknown
        ("per_branch", None, 5, 1, BranchPlan(0, 5, 5, 1, (1.0,))),
        ("per_branch", None, 5, 5, BranchPlan(0, 5, 1, 1, (1.0,))),
    ],
)
def test_plans(policy, branches, rows, conditions, expected):
    assert plan(policy, branches, rows, conditions) == expected


@pytest.mark.parametrize(
    ("policy", "called", "conditions", "expected"),
    [
        # two prompts of two images each; the negatives' call, then the positives'
        ("positive", 0, 2, BranchPlan(4, 4, 2, 1, (1.0,))),
        ("positive", 1, 2, BranchPlan(4, 4, 2, 1, (1.0,))),
        ("cond_only", 0, 2, BranchPlan(4, 4, 2, 1, (0.0,))),
        ("cond_only", 1, 2, BranchPlan(4, 4, 2, 1, (1.0,))),
        ("per_branch", 0, 2, BranchPlan(0, 8, 2, 2, (1.0,), slice(0, 4))),
        ("per_branch", 1, 2, BranchPlan(0, 8, 2, 2, (1.0,), slice(4, 8))),
        ("positive", 0, 1, BranchPlan(4, 4, 4, 1, (1.0,))),
        ("cond_only", 1, 1, BranchPlan(4, 4, 4, 1, (1.0,))),
        ("per_branch", 0, 1, BranchPlan(0, 8, 8, 1, (1.0,), slice(0, 4))),
        ("per_branch", 1, 1, BranchPlan(0, 8, 8, 1, (1.0,), slice(4, 8))),
    ],
)
def test_a_call_for_each_branch(policy, called, conditions, expected):
    """What the adapter computes is the same in both calls of a step, so the second finds it in the cache."""
    found = plan(policy, GUIDED, 8, conditions, called)
    assert found == expected
    assert found.key == plan(policy, GUIDED, 8, conditions, 1 - called).key
    assert found.key == plan(policy, GUIDED, 8, conditions).key


def test_a_call_for_each_branch_wherever_the_prompt_is():
    whole = (True, False, False)
    for called, factor in enumerate((1.0, 0.0, 0.0)):
        assert plan("cond_only", whole, 6, 2, called) == BranchPlan(0, 2, 1, 1, (factor,))
        kept = slice(2 * called, 2 * called + 2)
        assert plan("per_branch", whole, 6, 2, called) == BranchPlan(0, 6, 1, 3, (1.0,), kept)


@pytest.mark.parametrize(
    ("policy", "branches", "rows", "conditions", "name", "received", "expected", "hint"),
    [
        ("positive", GUIDED, 4, 4, "condition", 4, "divides the 2 images", ""),
        ("positive", GUIDED, 6, 2, "condition", 2, "divides the 3 images", ""),
        ("per_branch", GUIDED, 4, 4, "condition", 4, "divides the 2 images", ""),
        ("positive", GUIDED, 3, 1, "encoder_hidden_states", 3, "multiple of 2 rows", "per_branch"),
        ("per_branch", None, 4, 2, "condition", 2, "1 or 4 maps", ""),
    ],
)
def test_what_does_not_divide_is_an_error(policy, branches, rows, conditions, name, received, expected, hint):
    with refused(name, received, expected=expected, hint=hint):
        plan(policy, branches, rows, conditions)


@pytest.mark.parametrize("name", sorted(name for name in KNOWN_PIPELINES if "Nexus" not in name))
def test_known_pipelines_have_the_layout_that_the_table_says(name):
    """Against diffusers' own source: the order in which the embeddings are put together."""
    cls = getattr(diffusers, name)
    source = inspect.getsource(cls.__call__).replace(" ", "").replace("\n", "")
    layout = KNOWN_PIPELINES[name].__name__
    if layout == "guided_by_variable":
        assert "do_classifier_free_guidance=guidance_scale>1.0" in source
        assert "prompt_embeds=torch.cat([negative_prompt_embeds,prompt_embeds]" in source
        assert "uncond_emb,_=prompt_embeds.chunk(2)" in source  # the second call's
        return
    assert isinstance(cls.do_classifier_free_guidance, property)
    if layout == "_single":
        assert inspect.getsource(cls.do_classifier_free_guidance.fget).rstrip().endswith("return False")
    elif layout == "_instructed":
        source = inspect.getsource(cls._encode_prompt).replace(" ", "")
        assert "torch.cat([prompt_embeds,negative_prompt_embeds,negative_prompt_embeds])" in source
    elif layout == "_perturbed":
        assert "_prepare_perturbed_attention_guidance(prompt_embeds,negative_prompt_embeds" in source
        assert isinstance(cls.do_perturbed_attention_guidance, property)
    else:
        assert "prompt_embeds=torch.cat([negative_prompt_embeds,prompt_embeds]" in source
        assert "perturbed" not in source


def bare(cls):
    """An instance without the costs of one."""
    return cls.__new__(cls)


def test_a_subclass_that_keeps_the_loop_is_known_and_one_with_its_own_is_not():
    class Renamed(diffusers.StableDiffusionPipeline):
        pass

    class OwnLoop(diffusers.StableDiffusionPipeline):
        def __call__(self):
            pass

    class StableDiffusionPipeline(diffusers.DiffusionPipeline):  # the name alone does not make it known
        def __call__(self):
            pass

    assert BASE.knows(bare(Renamed))
    assert BASE.knows(bare(diffusers.StableDiffusionPipeline))
    assert not BASE.knows(bare(OwnLoop))
    assert not BASE.knows(bare(StableDiffusionPipeline))
    assert not BASE.knows(None)


class Announced(diffusers.StableDiffusionPipeline):
    """Only prints, around its parent's loop."""

    def __call__(self, *args, **kwargs):
        print(self.vae)
        return super().__call__(*args, **kwargs)


class WithoutGradients(diffusers.StableDiffusionPipeline):
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Retried(diffusers.StableDiffusionXLPipeline):
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        parent = super()

        def once(seed):
            return parent.__call__(*args, generator=torch.Generator().manual_seed(seed), **kwargs)

        return [once(seed) for seed in range(2)]


class Refined(diffusers.StableDiffusionPipeline):
    """Its parent's loop, and steps of its own."""

    def __call__(self, *args, **kwargs):
        latents = super().__call__(*args, **kwargs)
        return self.unet(latents, 0, None)


class RefinedWithin(diffusers.StableDiffusionPipeline):
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        def step(latents):
            return self.unet(latents, 0, None)

        return step(super().__call__(*args, **kwargs))


class Delegating(Announced):
    """Calls a class that calls its parent."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class OverAnother(Refined):
    """Calls a class that does more than call its parent."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("cls", [Announced, WithoutGradients, Retried, Delegating])
def test_a_subclass_that_calls_its_parents_loop_is_known(cls):
    assert BASE.knows(bare(cls))


@pytest.mark.parametrize("cls", [Refined, RefinedWithin, OverAnother])
def test_a_subclass_that_also_calls_the_denoiser_is_not_known(cls):
    assert not BASE.knows(bare(cls))


@pytest.mark.parametrize("policy", ["positive", "cond_only"])
def test_the_way_out_is_named(policy):
    with refused("policy", policy, expected='"per_branch" for a call without a pipeline', hint="branches="):
        check_policy(BASE, None, policy)
    pipe = bare(diffusers.StableDiffusionUpscalePipeline)
    for check in (lambda: check_policy(BASE, pipe, policy), lambda: branches_of(pipe, policy)):
        with refused("policy", policy, expected="StableDiffusionUpscalePipeline", hint="branches="):
            check()
    check_policy(BASE, pipe, policy, GUIDED)
    assert branches_of(pipe, "per_branch") is None


def test_guidance_is_read_at_every_call():
    class Pipe(diffusers.StableDiffusionPipeline):
        do_classifier_free_guidance = True

    pipe = bare(Pipe)
    assert branches_of(pipe, "positive") == (False, True)
    Pipe.do_classifier_free_guidance = False
    assert branches_of(pipe, "positive") == (True,)


def test_a_second_call_for_the_negatives_alone():
    """Self-attention guidance: the features are those that the negative branch got before."""
    pipe = bare(diffusers.StableDiffusionSAGPipeline)
    whole = torch.arange(8.0).reshape(8, 1, 1)
    guided = {"prompt_embeds": whole, "do_classifier_free_guidance": True}

    def planned(policy, text, variables=guided):
        layout = call_layout(BASE, CallingPipeline(pipe, variables), policy, text)
        return layout.text, plan_branches(policy, layout, conditions=2)

    for policy, factors in (("positive", (1.0, 1.0)), ("cond_only", (0.0, 1.0))):
        text, first = planned(policy, whole)
        assert (text is whole, first) == (True, BranchPlan(4, 4, 2, 1, factors))
        text, second = planned(policy, whole[:4])
        assert (text is whole, second) == (True, BranchPlan(4, 4, 2, 1, factors[:1]))
        assert second.key == first.key
    assert planned("per_branch", whole)[1] == BranchPlan(0, 8, 2, 2, (1.0,))
    text, second = planned("per_branch", whole[:4])
    assert (text is whole, second) == (True, BranchPlan(0, 8, 2, 2, (1.0,), kept=slice(0, 4)))
    unguided = guided | {"do_classifier_free_guidance": False}
    assert planned("positive", whole, unguided)[1] == BranchPlan(0, 8, 4, 1, (1.0,))
