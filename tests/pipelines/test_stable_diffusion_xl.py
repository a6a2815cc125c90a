"""StableDiffusionXLNexusPipeline: what differs from Stable Diffusion 1.x's."""

import inspect
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from tests import tiny
from tests.refusals import refused

import nexus_adapters
from nexus_adapters.errors import MISSING
from nexus_adapters.injection import Control, attach
from nexus_adapters.pipelines import StableDiffusionXLNexusPipeline

OPTIONS = {"num_inference_steps": 3, "output_type": "pt", "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def base():
    return tiny.sdxl()


@pytest.fixture(scope="module")
def adapter(base):
    return tiny.adapter(base.unet)


@pytest.fixture(scope="module")
def pipe(base, adapter):
    return tiny.quiet(
        StableDiffusionXLNexusPipeline(**base.components, adapter=adapter, add_watermarker=False)
    )


def generate(pipe, prompt="a red star", **options):
    return pipe(prompt, generator=tiny.generators(1)[0], **OPTIONS | options).images


def test_it_is_the_stock_pipeline_with_a_control_attached(base, adapter, pipe):
    condition = tiny.condition()
    settings = {"prompt_2": "a blue ring", "height": 64, "width": 64}
    with attach(base, Control(adapter, condition, 0.7, 0.2, 0.9, policy="cond_only")):
        expected = generate(base, **settings)
    found = generate(
        pipe,
        image=condition,
        adapter_conditioning_scale=0.7,
        control_guidance_start=0.2,
        control_guidance_end=0.9,
        policy="cond_only",
        **settings,
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, generate(base, **settings))
    assert torch.equal(
        generate(pipe, image=condition, adapter_conditioning_scale=0, **settings), generate(base, **settings)
    )


def test_a_scale_along_the_schedule(pipe):
    late = generate(pipe, image=tiny.image(), adapter_conditioning_scale=[0, 1])
    assert torch.equal(late, generate(pipe, image=tiny.image(), control_guidance_start=0.5))


def test_the_image_has_the_conditions_size(pipe):
    assert generate(pipe, image=tiny.image(72, 40)).shape == (1, 3, 72, 40)


def test_the_signature_is_the_stock_one_and_ours():
    stock = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    ours = inspect.signature(StableDiffusionXLNexusPipeline.__call__).parameters
    assert list(ours)[: len(stock) - 1] == list(stock)[:-1]
    assert {"image", "adapter_conditioning_scale", "policy"} <= set(ours)


@pytest.mark.parametrize("place", ["prompt_2", "height"])
def test_an_image_by_position_is_refused(pipe, place):
    for image in (tiny.image(), [tiny.image()], tiny.condition()):
        with refused("image", "positional", expected="keyword"):
            pipe("a red star", **{place: image})


def test_misspelled_arguments_are_refused(pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompt2'"):
        pipe("a red star", image=tiny.image(), prompt2="a blue ring")


def test_from_pipe_both_ways(base, adapter, pipe):
    made = tiny.quiet(StableDiffusionXLNexusPipeline.from_pipe(base, adapter=adapter))
    expected = generate(pipe, image=tiny.image())
    assert torch.equal(generate(made, image=tiny.image()), expected)
    assert torch.equal(generate(tiny.quiet(StableDiffusionXLPipeline.from_pipe(made))), generate(base))
    editor = StableDiffusionXLImg2ImgPipeline.from_pipe(made)
    assert torch.equal(
        generate(
            tiny.quiet(StableDiffusionXLNexusPipeline.from_pipe(editor, adapter=adapter)), image=tiny.image()
        ),
        expected,
    )


def test_another_kind_of_base_is_refused_by_name(adapter):
    with refused("unet", "in a StableDiffusionPipeline", expected="Stable Diffusion XL"):
        StableDiffusionXLNexusPipeline.from_pipe(tiny.sd15(), adapter=adapter)


def test_a_refiner_is_refused_by_its_numbers(base, adapter):
    """It reads the second text encoder alone: 1280 numbers a token in place of 2048."""
    refiner = tiny.sdxl(unet=tiny.unet(tiny.SDXL_UNET, cross_attention_dim=tiny.TEXT_WIDTH))
    with refused("adapter", "32", expected="text_width 16"):
        StableDiffusionXLNexusPipeline.from_pipe(refiner, adapter=adapter)
    with refused("adapter", "32", expected="text_width 16"):
        attach(refiner, Control(adapter, tiny.condition()))


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    made = tiny.quiet(StableDiffusionXLNexusPipeline.from_pretrained(tmp_path))
    expected = generate(pipe, image=tiny.image())
    assert torch.allclose(generate(made, image=tiny.image()), expected, atol=1e-5)


@pytest.mark.full
def test_saved_and_loaded_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(tiny.condition(), tmp_path / "condition.pt")
    code = f"""
import torch
import nexus_adapters
pipe = nexus_adapters.StableDiffusionXLNexusPipeline.from_pretrained({str(tmp_path / "pipe")!r})
torch.set_num_threads(1)
images = pipe(
    "a red star", image=torch.load({str(tmp_path / "condition.pt")!r}),
    generator=torch.Generator().manual_seed(0), **{OPTIONS!r},
).images
torch.save(images, {str(tmp_path / "found.pt")!r})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = generate(pipe, image=tiny.condition())
    assert torch.allclose(torch.load(tmp_path / "found.pt"), expected, atol=1e-5)


def test_names_survive_moves_of_files(pipe):
    assert nexus_adapters.StableDiffusionXLNexusPipeline is StableDiffusionXLNexusPipeline
    assert StableDiffusionXLNexusPipeline.__module__ == "nexus_adapters"
    assert isinstance(pipe, DiffusionPipeline)
    assert pipe.model_cpu_offload_seq.index("adapter") < pipe.model_cpu_offload_seq.index("unet")


def test_loaded_by_diffusers_own_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionXLNexusPipeline


def test_without_a_unet_it_encodes_prompts(base, adapter):
    parts = base.components | dict.fromkeys(("unet", "vae", "scheduler"))
    made = StableDiffusionXLNexusPipeline(**parts, adapter=adapter, add_watermarker=False)
    found = made.encode_prompt("a red star", device="cpu", do_classifier_free_guidance=False)[0]
    expected = base.encode_prompt("a red star", device="cpu", do_classifier_free_guidance=False)[0]
    assert torch.equal(found, expected)
    with refused("unet", MISSING):
        made("a red star", image=tiny.image())


def test_an_adapter_of_another_kind_of_base_is_named(base):
    wrong = tiny.adapter(tiny.unet())
    with refused("adapter", "an adapter for SD 1.x/2.x", expected="an adapter for SDXL"):
        StableDiffusionXLNexusPipeline(**base.components, adapter=wrong)
