"""Stock diffusers pipelines, unchanged, with a control attached to them."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    T2IAdapter,
)
from PIL import Image
from tests import tiny
from tests.refusals import refused

from nexus_adapters.injection import Control, attach

PROMPTS = ["a red star", "photo of a dog"]
LEFT_HALF = Image.new("L", (64, 64))
LEFT_HALF.paste(255, (0, 0, 32, 64))

IMG2IMG = {"image": [tiny.image(), tiny.image()], "strength": 0.5}
INPAINT = {"image": [tiny.image(), tiny.image()], "mask_image": [LEFT_HALF, LEFT_HALF], "strength": 1.0}
CONTROLNET = {"image": [tiny.image(seed=8), tiny.image(seed=8)]}
SAG = {"sag_scale": 0.7}
EDIT = {"image": [tiny.image(), tiny.image()], "image_guidance_scale": 1.5}


def with_controlnet(build, cls):
    pipe = build()
    return build(cls, unet=pipe.unet, controlnet=tiny.controlnet(pipe.unet))


def pix2pix():
    return tiny.sd15(diffusers.StableDiffusionInstructPix2PixPipeline, unet=tiny.unet(in_channels=8))


def nine_channels():
    return tiny.sd15(StableDiffusionInpaintPipeline, unet=tiny.unet(in_channels=9))


def latent_consistency():
    unet = tiny.unet(time_cond_proj_dim=8)
    scheduler = LCMScheduler(num_train_timesteps=1000, original_inference_steps=50)
    return tiny.quiet(
        diffusers.LatentConsistencyModelPipeline(
            **tiny.sd15_components(unet=unet, scheduler=scheduler), requires_safety_checker=False
        )
    )


# name -> (builds the pipeline, its arguments, calls of the UNet in the two steps asked for)
PIPELINES = {
    "text-to-image": (tiny.sd15, {}, 2),
    "image-to-image": (lambda: tiny.sd15(StableDiffusionImg2ImgPipeline), IMG2IMG, 1),
    "inpainting": (lambda: tiny.sd15(StableDiffusionInpaintPipeline), INPAINT, 2),
    "inpainting, nine channels": (nine_channels, INPAINT, 2),
    "ControlNet": (lambda: with_controlnet(tiny.sd15, StableDiffusionControlNetPipeline), CONTROLNET, 2),
    "SDXL": (tiny.sdxl, {}, 2),
    "SDXL image-to-image": (lambda: tiny.sdxl(StableDiffusionXLImg2ImgPipeline), IMG2IMG, 1),
    "SDXL inpainting": (lambda: tiny.sdxl(StableDiffusionXLInpaintPipeline), INPAINT, 2),
    "SDXL ControlNet": (
        lambda: with_controlnet(tiny.sdxl, StableDiffusionXLControlNetPipeline),
        CONTROLNET,
        2,
    ),
    "InstructPix2Pix": (pix2pix, EDIT, 2),
    "perturbed attention": (
        lambda: tiny.sd15(diffusers.StableDiffusionPAGPipeline, pag_applied_layers="mid"),
        {"pag_scale": 2.0},
        2,
    ),
    "self-attention guidance": (lambda: tiny.sd15(diffusers.StableDiffusionSAGPipeline), SAG, 4),
    "LCM": (latent_consistency, {}, 2),
}

# One of each layout of the guidance branches, and a UNet with a middle feature; the others are run in full.
SHORT = ("text-to-image", "SDXL inpainting", "InstructPix2Pix", "self-attention guidance")


def run(pipe, prompt, arguments, rows=slice(None), **options):
    arguments = {k: v[rows] if isinstance(v, list) else v for k, v in arguments.items()}
    steps = {"num_inference_steps": 2, "output_type": "latent"}
    seeded = {"generator": tiny.generators(len(PROMPTS))[rows]}
    return pipe(prompt=prompt[rows], **steps, **seeded, **arguments, **options).images


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.full) for name in PIPELINES]
)
def test_stock_pipelines(name):
    build, arguments, steps = PIPELINES[name]
    pipe = build()
    adapter = tiny.adapter(pipe.unet)
    maps = tiny.condition(2)
    base = run(pipe, PROMPTS, arguments)
    calls, taken = [], []
    adapter.register_forward_hook(lambda m, args, out: calls.append(args))
    unet_hook = pipe.unet.register_forward_pre_hook(lambda *_: taken.append(1))
    images = {}
    for policy in ("positive", "cond_only", "per_branch"):
        calls.clear()
        taken.clear()
        with attach(pipe, Control(adapter, maps, policy=policy)) as handle:
            images[policy] = run(pipe, PROMPTS, arguments)
            assert len(calls) == 1
            assert len(taken) == steps
            assert (images[policy] - base).abs().max() > 0.01
            handle.controls[0].scale = 0
            assert torch.equal(run(pipe, PROMPTS, arguments), base)
    unet_hook.remove()
    for index in range(2):  # every image follows its own map and prompt
        with attach(pipe, Control(adapter, maps[index : index + 1])):
            single = run(pipe, PROMPTS, arguments, slice(index, index + 1))
        assert (images["positive"][index] - single[0]).abs().max() < 1e-3
    assert torch.equal(run(pipe, PROMPTS, arguments), base)


@pytest.mark.parametrize(
    "cls",
    [
        StableDiffusionInpaintPipeline,
        pytest.param(StableDiffusionXLInpaintPipeline, marks=pytest.mark.full),
    ],
)
def test_cropped_inpainting_needs_to_know_the_crop(cls):
    pipe = (tiny.sdxl if "XL" in cls.__name__ else tiny.sd15)(cls)
    adapter = tiny.adapter(pipe.unet)
    mask = Image.new("L", (128, 96))
    mask.paste(255, (72, 24, 100, 50))
    arguments = {"image": tiny.image(96, 128), "mask_image": mask, "num_inference_steps": 2}
    arguments |= {"width": 64, "height": 64, "output_type": "pil"}
    whole = tiny.condition(1, 96, 128)
    for target in (pipe, pipe.unet):
        with attach(target, Control(adapter, whole[:, :, :64, :64], policy="per_branch")) as handle:
            with refused("padding_mask_crop", "8", expected="crop="):
                pipe("a red star", **arguments, padding_mask_crop=8)
            handle.scale = 0
            pipe("a red star", **arguments, padding_mask_crop=8)
            handle.scale = 1
            pipe("a red star", **arguments)
    box = pipe.mask_processor.get_crop_region(mask, 64, 64, pad=8)
    left, top, right, bottom = box

    def generated(**settings):
        with attach(pipe, Control(adapter, **settings)):
            seeded = arguments | {"generator": tiny.generators(1)[0]}
            return np.asarray(pipe("a red star", **seeded, padding_mask_crop=8).images[0])

    cropped = generated(condition=whole, crop=box)
    black = whole.clone()
    black[:, :, :top] = black[:, :, bottom:] = black[..., :left] = black[..., right:] = 0
    assert np.array_equal(cropped, generated(condition=black, crop=box))  # nothing else is read
    assert not np.array_equal(cropped, generated(condition=whole.flip(3), crop=box))
    # The box is in pixels of the mask, whatever the resolution of the map.
    for factor in (2, 0.5):
        resized = torch.nn.functional.interpolate(whole, scale_factor=factor, mode="nearest-exact")
        here, elsewhere = (
            np.abs(generated(condition=given, crop=box).astype(int) - cropped).mean()
            for given in (resized, resized.flip(3))
        )
        assert here < elsewhere / 3
    with refused("crop", "(0, 0, 64, 64)", expected=str(tuple(box))):
        generated(condition=whole, crop=(0, 0, 64, 64))
    with refused("condition", "64x64", expected="aspect"):
        generated(condition=whole[:, :, :64, :64], crop=box)


def test_tiled_pipelines_are_refused():
    pipe = object.__new__(diffusers.StableDiffusionPanoramaPipeline)
    object.__setattr__(pipe, "unet", tiny.unet())
    with refused("pipe_or_denoiser", "StableDiffusionPanoramaPipeline", expected="whole image at once"):
        attach(pipe, Control(tiny.adapter(pipe.unet), tiny.condition(), policy="per_branch"))


def test_img2img_starts_late_in_the_schedule():
    """`end` is a position in the schedule, not a share of the steps taken."""
    pipe = tiny.sd15(StableDiffusionImg2ImgPipeline)
    adapter = tiny.adapter(pipe.unet)
    base = run(pipe, PROMPTS, IMG2IMG)
    with (
        pytest.warns(UserWarning, match="never acted"),
        attach(pipe, Control(adapter, tiny.condition(), end=0.45)),
    ):
        assert torch.equal(run(pipe, PROMPTS, IMG2IMG), base)


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.full), 0.6])
def test_a_t2i_adapter_gives_what_diffusers_own_pipeline_gives(scale):
    torch.manual_seed(3)
    adapter = T2IAdapter(channels=[8, 16, 24, 24], num_res_blocks=1).eval().requires_grad_(False)
    for block in adapter.adapter.body:
        for weight in block.parameters():
            weight.mul_(3)
    components = tiny.sd15_components()
    theirs = StableDiffusionAdapterPipeline(**components, adapter=adapter, requires_safety_checker=False)
    ours = tiny.quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))
    maps = tiny.condition()
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    expected = tiny.quiet(theirs)(
        "a red star",
        image=maps,
        adapter_conditioning_scale=scale,
        generator=tiny.generators(1)[0],
        **options,
    ).images
    base = ours("a red star", generator=tiny.generators(1)[0], **options).images
    with attach(ours, Control(adapter, maps, scale=scale)):
        found = ours("a red star", generator=tiny.generators(1)[0], **options).images
    assert torch.equal(found, expected)
    assert (found - base).abs().max() > 0.01


@pytest.mark.parametrize(
    ("policy", "guidance_scale"),
    [
        ("positive", 5.0),
        ("cond_only", 1.0),
        ("per_branch", 5.0),
        pytest.param("positive", 1.0, marks=pytest.mark.full),
        pytest.param("cond_only", 5.0, marks=pytest.mark.full),
        pytest.param("per_branch", 1.0, marks=pytest.mark.full),
    ],
)
def test_pipelines_that_share_a_unet_share_its_controls(policy, guidance_scale):
    """Each call's layout is that of the pipeline that makes it, not of the one that was attached to."""
    first = tiny.sd15()
    second = tiny.quiet(StableDiffusionImg2ImgPipeline(**first.components, requires_safety_checker=False))
    control = Control(tiny.adapter(first.unet), tiny.condition(2), policy=policy)
    with attach(second, control):
        expected = run(second, PROMPTS, IMG2IMG, guidance_scale=guidance_scale)
    with attach(first, control):
        run(first, PROMPTS, {}, guidance_scale=6.0 - guidance_scale)
        assert torch.equal(run(second, PROMPTS, IMG2IMG, guidance_scale=guidance_scale), expected)
