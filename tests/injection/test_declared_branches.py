"""Pipelines whose guidance branches the caller names: `attach(..., branches=...)`."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control, attach

PROMPTS = ["a red star", "photo of a dog"]
NEGATIVE = ["blurry", "blurry"]
GUIDANCE = 5.0


class OwnLoop(StableDiffusionPipeline):
    """A loop of its own, as community pipelines have; `order` is that of the branches in a batch."""

    order = ("negative", "positive")

    @torch.no_grad()
    def __call__(self, prompt, steps=2):
        return denoised(self, prompt, steps, self.order)


class Plain:
    """Not a diffusers pipeline at all."""

    def __init__(self, pipe):
        self.unet, self.scheduler, self.parts = pipe.unet, pipe.scheduler, pipe

    @torch.no_grad()
    def __call__(self, prompt, steps=2):
        return denoised(self.parts, prompt, steps, OwnLoop.order)


def denoised(pipe, prompt, steps, order):
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True, NEGATIVE)
    texts = {"positive": positive, "negative": negative}
    text = torch.cat([texts[name] for name in order])
    pipe.scheduler.set_timesteps(steps)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in tiny.generators(len(prompt))])
    for t in pipe.scheduler.timesteps:
        rows = pipe.unet(torch.cat([latents] * len(order)), t, encoder_hidden_states=text).sample
        noise = dict(zip(order, rows.chunk(len(order)), strict=True))
        guided = noise["negative"] + GUIDANCE * (noise["positive"] - noise["negative"])
        latents = pipe.scheduler.step(guided, t, latents).prev_sample
    return latents


def stock(pipe, steps=2):
    return pipe(
        PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=tiny.generators(len(PROMPTS)),
        output_type="latent",
    ).images


@pytest.fixture(scope="module")
def known():
    return tiny.sd15()


@pytest.fixture(scope="module")
def adapter(known):
    return tiny.adapter(known.unet)


@pytest.fixture(scope="module")
def own(known):
    return tiny.quiet(OwnLoop(**known.components, requires_safety_checker=False))


@pytest.mark.parametrize(
    ("policy", "conditions"),
    [
        ("positive", 2),
        ("cond_only", 1),
        ("per_branch", 2),
        pytest.param("positive", 1, marks=pytest.mark.full),
        pytest.param("cond_only", 2, marks=pytest.mark.full),
        pytest.param("per_branch", 1, marks=pytest.mark.full),
    ],
)
def test_an_unknown_pipeline_gives_what_the_known_one_does(known, own, adapter, policy, conditions):
    control = Control(adapter, tiny.condition(conditions), policy=policy)
    assert torch.equal(own(PROMPTS), base := stock(known))
    with attach(known, control):
        expected = stock(known)
    with attach(own, control, branches=["negative", "positive"]):
        assert torch.equal(own(PROMPTS), expected)
    with attach(Plain(known), control, branches=("negative", "positive")):
        assert torch.equal(Plain(known)(PROMPTS), expected)
    assert (expected - base).abs().max() > 0.01


@pytest.mark.parametrize("policy", ["positive", "cond_only", "per_branch"])
def test_the_order_is_the_callers(known, own, adapter, policy):
    class Reversed(OwnLoop):
        order = ("positive", "negative")

    control = Control(adapter, tiny.condition(2), policy=policy)
    turned = tiny.quiet(Reversed(**known.components, requires_safety_checker=False))
    with attach(own, control, branches=own.order):
        expected = own(PROMPTS)
    with attach(turned, control, branches=turned.order):
        assert torch.allclose(turned(PROMPTS), expected, atol=1e-4)
    if policy == "cond_only":
        with attach(turned, control, branches=own.order):
            assert not torch.allclose(turned(PROMPTS), expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["positive", "cond_only"])
def test_a_denoiser_alone(known, adapter, policy):
    control = Control(adapter, tiny.condition(2), policy=policy)
    with attach(known, control):
        expected = stock(known)
    with attach(known.unet, control, branches=("negative", "positive")):
        assert torch.equal(stock(known), expected)


def test_a_denoiser_alone_without_guidance(known, adapter):
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.TEXT_WIDTH)
    maps = tiny.condition(2)
    with torch.no_grad():
        with attach(known.unet, Control(adapter, maps, policy="per_branch")):
            expected = known.unet(latents, 7, text).sample
        with attach(known.unet, Control(adapter, maps), branches=("positive",)):
            assert torch.equal(known.unet(latents, 7, text).sample, expected)


def test_what_is_named_goes_before_what_is_known(known, adapter):
    """Even of a known pipeline: the caller may have changed what it does."""
    with (
        attach(known, Control(adapter, tiny.condition()), branches=("positive",) * 3),
        refused("encoder_hidden_states", "4", expected="multiple of 3"),
    ):
        stock(known)


@pytest.mark.parametrize("branches", [(), "positive", ("negative", "prompt"), ("positive", True), 2, [[]]])
def test_only_these_names_are_branches(known, adapter, branches):
    with refused("branches", repr(branches), expected='"negative" and "positive"'):
        attach(known, Control(adapter, tiny.condition()), branches=branches)


def test_one_branch_reads_the_prompt(known, adapter):
    with refused("branches", "('negative', 'negative')", expected='at least one "positive"'):
        attach(known, Control(adapter, tiny.condition()), branches=("negative", "negative"))


def test_branches_are_not_guessed(own, adapter):
    with refused("policy", "positive", expected="OwnLoop", hint="branches="):
        attach(own, Control(adapter, tiny.condition()))


def test_a_subclass_around_its_parents_loop_keeps_the_layout(known, adapter):
    class Announced(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    control = Control(adapter, tiny.condition(2), policy="cond_only")
    with attach(known, control):
        expected = stock(known)
    announced = tiny.quiet(Announced(**known.components, requires_safety_checker=False))
    with attach(announced, control):
        assert torch.equal(stock(announced), expected)


def test_what_a_subclass_does_around_its_parents_loop_has_no_known_layout(known, adapter):
    """Its batch need not be laid out as its parent's. Here only a helper shows that it calls the UNet."""

    class Refined(StableDiffusionPipeline):
        def refined(self, latents):
            return self.unet(latents, 0, torch.zeros(2, 5, tiny.TEXT_WIDTH)).sample

        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            return self.refined(super().__call__(*args, **kwargs).images)

    pipe = tiny.quiet(Refined(**known.components, requires_safety_checker=False))
    options = {"num_inference_steps": 1, "output_type": "latent", "height": 64, "width": 64}
    with attach(pipe, Control(adapter, tiny.condition())) as handle:
        with refused("policy", "positive", expected="Refined"):
            pipe(PROMPTS, **options)
        handle.controls[0].policy = "per_branch"
        assert pipe(PROMPTS, **options).shape == (2, 4, 8, 8)
