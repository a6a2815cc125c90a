"""Many threads through one denoiser, as in a server: each follows its own controls."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tests import tiny

from nexus_adapters.injection import Control, attach
from nexus_adapters.pipelines import StableDiffusionNexusPipeline


@pytest.fixture(scope="module")
def parts():
    return tiny.sd15_components()


@pytest.fixture(scope="module")
def adapter(parts):
    return tiny.adapter(parts["unet"])


@pytest.fixture(scope="module")
def texts(parts):
    """Prompt embeddings: threads that tokenize with one fast tokenizer disturb each other in transformers."""
    pipe = tiny.quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    embeds = [pipe.encode_prompt(f"a {color} star", "cpu", 1, True, "") for color in ("red", "blue")]
    return [{"prompt_embeds": p, "negative_prompt_embeds": n} for p, n in embeds]


def pipeline(kind, parts, **more):
    """One of its own for each thread, with a scheduler of its own, over the same models."""
    own = {"scheduler": DDIMScheduler.from_config(parts["scheduler"].config)}
    return tiny.quiet(kind(**parts | own, **more, requires_safety_checker=False))


def options(text, steps):
    seed = tiny.generators(1)[0]
    return {**text, "num_inference_steps": steps, "generator": seed, "output_type": "latent"}


def slow(position):
    """As one is that reads the timestep from an accelerator: other threads get in between."""
    time.sleep(0.002)
    return 1.0 - position / 2


def generate(number, parts, adapter, texts, steps):
    """By `attach`, by a pipeline with an adapter, or without a control."""
    text, condition = texts[number % 2], tiny.condition(seed=number)
    if number % 4 == 3:
        stock = pipeline(StableDiffusionPipeline, parts)
        return stock(height=64, width=64, **options(text, steps)).images
    if number % 4 == 2:
        nexus = pipeline(StableDiffusionNexusPipeline, parts, adapter=adapter)
        given = {"image": condition, "adapter_conditioning_scale": slow}
        return nexus(**given, **options(text, steps)).images
    stock = pipeline(StableDiffusionPipeline, parts)
    with attach(stock, Control(adapter, condition, scale=slow), shared=False):
        return stock(height=64, width=64, **options(text, steps)).images


@pytest.mark.parametrize(("rounds", "steps"), [(2, 2), pytest.param(25, 4, marks=pytest.mark.full)])
def test_threads_attach_and_remove_over_one_denoiser(parts, adapter, texts, rounds, steps):
    threads = 8
    hooks = dict(parts["unet"]._forward_pre_hooks), dict(parts["unet"]._forward_hooks)
    expected = [generate(number, parts, adapter, texts, steps) for number in range(threads)]
    start = threading.Barrier(threads)

    def work(number):
        start.wait(20)
        for _ in range(rounds):
            assert torch.equal(generate(number, parts, adapter, texts, steps), expected[number])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert (dict(parts["unet"]._forward_pre_hooks), dict(parts["unet"]._forward_hooks)) == hooks
    assert not torch.equal(expected[0], expected[2])


def bare_call(unet):
    text, latents = torch.ones(2, 5, tiny.TEXT_WIDTH), torch.ones(2, 4, 8, 8)
    with torch.no_grad():
        return unet(latents, 10, text).sample


@pytest.mark.parametrize("compiled", [False, True])
def test_removed_while_a_call_begins(adapter, compiled):
    """By a hook that runs before ours, or by another attachment: what a thread may do at any moment."""
    unet = tiny.unet()
    if compiled:  # what unet.compile() does, without the compiler
        unet._compiled_call_impl = unet._call_impl
    base = bare_call(unet)
    handles = [attach(unet, Control(adapter, tiny.condition(seed=s), policy="per_branch")) for s in range(3)]

    def remove_the_others(*_):
        for handle in handles[1:]:
            handle.remove()

    going = adapter.register_forward_hook(remove_the_others)  # while the first one's features are computed
    bare_call(unet)
    going.remove()
    with attach(tiny.unet(), handles[0].controls[0]) as alone:
        assert torch.equal(bare_call(unet), bare_call(alone._denoiser))
    handles[0].remove()
    assert torch.equal(bare_call(unet), base)
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks


def test_the_last_one_removed_while_a_call_begins(adapter):
    unet = tiny.unet()
    base = bare_call(unet)
    handles = []
    first = unet.register_forward_pre_hook(lambda *_: handles.pop().remove())
    handles.append(attach(unet, Control(adapter, tiny.condition(), policy="per_branch")))
    assert torch.equal(bare_call(unet), base)
    first.remove()
    assert not unet._forward_pre_hooks
