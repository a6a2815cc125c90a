"""A control that never acts is a warning: at removal, or when the next generation begins."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control, attach
from nexus_adapters.pipelines import StableDiffusionNexusPipeline


@pytest.fixture(scope="module")
def parts():
    return tiny.sd15_components()


@pytest.fixture(scope="module")
def adapter(parts):
    return tiny.adapter(parts["unet"])


@pytest.fixture
def pipe(parts):
    return tiny.sd15(**parts)


def generate(pipe, **options):
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": tiny.generators(1)[0]}
    size = {} if "image" in options else {"height": 64, "width": 64}
    return pipe("a red star", **given | size | options).images


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def never_acted(*shown):
    return pytest.warns(UserWarning, match=".*".join(["never acted", *shown]))


@pytest.mark.parametrize(
    "settings",
    [{"end": 0.5}, {"start": 0.2, "end": 0.9}, {"scale": [1, 0]}, {"scale": lambda p: float(p < 0.5)}],
)
def test_a_sampler_whose_steps_a_control_leaves_out(parts, adapter, settings):
    pipe = tiny.sd15(**parts | {"scheduler": IPNDMScheduler()})  # steps through positions above 0.99 alone
    with never_acted("0.999 to 1"), attach(pipe, Control(adapter, tiny.condition(), **settings)):
        generate(pipe)


def test_a_generation_that_starts_late(parts, adapter):
    pipe = tiny.sd15(StableDiffusionImg2ImgPipeline, **parts)
    controls = [Control(adapter, tiny.condition(seed=seed), end=end) for seed, end in ((1, 1.0), (2, 0.3))]
    with pytest.warns(UserWarning, match="^control 2 of 2 never acted") as warned, attach(pipe, *controls):
        generate(pipe, image=tiny.image(), strength=0.5)
    assert len(warned) == 1


def test_the_next_generation_tells_of_a_handle_that_stays(pipe, adapter):
    handle = attach(pipe, Control(adapter, tiny.condition(), end=0.05))
    generate(pipe)
    with pytest.warns(UserWarning, match="never acted"):
        generate(pipe)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error", UserWarning)
        generate(pipe)
        handle.remove()


def test_a_pipeline_with_an_adapter(parts, adapter):
    nexus = tiny.sd15(StableDiffusionNexusPipeline, **parts, adapter=adapter)
    with never_acted():
        generate(nexus, image=tiny.image(), control_guidance_end=0.05)


def test_a_pipeline_that_runs_in_another_thread(pipe, adapter):
    base = generate(pipe)
    handle = attach(pipe, Control(adapter, tiny.condition()), shared=False)
    assert torch.equal(in_a_thread(generate, pipe), base)
    with pytest.warns(UserWarning, match="shared=False .* the pipeline ran in another"):
        handle.remove()


@pytest.mark.parametrize("how", ["replaced", "unwrapped", "compiled again", "hooks cleared"])
def test_a_unet_that_is_no_longer_the_one_that_is_attached_to(adapter, how):
    pipe = tiny.sd15()
    unet = pipe.unet
    if how == "unwrapped":
        pipe.unet = torch.compile(unet, backend="eager")
    if how == "compiled again":  # what unet.compile() does, without the compiler
        unet._compiled_call_impl = unet._call_impl
    handle = attach(pipe, Control(adapter, tiny.condition()))
    if how == "replaced":
        pipe.unet = tiny.unet()
    elif how == "unwrapped":
        pipe.unet = unet
    elif how == "compiled again":
        unet._compiled_call_impl = unet._call_impl
    else:
        unet._forward_pre_hooks.clear()
    with pytest.warns(UserWarning, match=r"^the pipeline's unet was replaced or compiled again after attach"):
        handle.remove()


@pytest.mark.usefixtures("silent")
def test_what_is_meant_is_no_warning(pipe, adapter):
    condition = tiny.condition()
    with attach(pipe, Control(adapter, condition, end=0.5)):  # acts in a part
        generate(pipe)
        generate(pipe)
    with attach(pipe, Control(adapter, condition, end=0.01)):  # nothing is generated
        pass
    with attach(pipe, Control(adapter, condition, scale=0, end=0.01)):
        generate(pipe)
    with attach(pipe, Control(adapter, condition), shared=False):
        generate(pipe)
        in_a_thread(generate, pipe)
    with pytest.raises(ZeroDivisionError), attach(pipe, Control(adapter, condition, end=0.01)):
        1 / generate(pipe).new_zeros(()).long().item()
    unet = pipe.unet
    with attach(pipe, Control(adapter, condition)):
        generate(pipe)
        pipe.unet = None  # to free memory
    pipe.unet = unet
    with attach(pipe, Control(adapter, condition)):
        pipe.unet = torch.compile(unet, backend="eager")
    pipe.unet = unet


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
        EDMEulerScheduler(sigma_min=1.0),
        CMStochasticIterativeScheduler(),
        EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", steps_offset=1, use_karras_sigmas=True
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_without_training_timesteps_are_refused_when_attaching(parts, adapter, scheduler):
    pipe = tiny.sd15(**parts | {"scheduler": scheduler})
    for settings in ({"end": 0.5}, {"start": 0.1}, {"scale": [1, 0.5]}):
        with refused("pipe_or_denoiser", type(scheduler).__name__, expected="timesteps from 0 to"):
            attach(pipe, Control(adapter, tiny.condition(), **settings))
    attach(pipe, Control(adapter, tiny.condition())).remove()  # nothing depends on them
