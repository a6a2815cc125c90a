import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from tests import tiny
from tests.refusals import refused
from tests.weights import use_weights, write_tiny

from nexus_adapters import Control, attach, load_adapter, load_base
from nexus_adapters.bases.families import base_of, check_finite
from nexus_adapters.embedded.held_out import load_test_scenes
from nexus_adapters.evaluation.generation import (
    Sampling,
    generate,
    generate_batch,
    initial_latents,
    reconstruct,
)
from nexus_adapters.methods import GenerationSettings, find_method

SAMPLING = Sampling(steps=2, batch_size=2)
SIZES = {"controlnet-xs": {"size_ratio": 1.0}}


@pytest.fixture(scope="module")
def scenes():
    return load_test_scenes(3)


@pytest.fixture(scope="module", autouse=True)
def _weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, write_tiny(tmp_path_factory.mktemp("weights")))
        yield


@pytest.fixture(scope="module")
def base():
    return tiny.quiet(load_base())


@pytest.fixture(scope="module")
def plain(base, scenes):
    """The base alone."""
    return generate(base, None, scenes, SAMPLING)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [1, 3])
def test_images_that_are_not_finite_are_no_black_pictures(value, count):
    images = np.zeros((3, 4, 5, 3), np.float32)
    check_finite(images)
    images[:count, 1, 2, 0] = value
    with refused("images", f"{count} of 3", expected="finite pixels", hint="float32"):
        check_finite(images)


def test_a_diverged_adapter_is_refused(base, scenes):
    adapter = load_adapter("t2i")
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("nan"))
    with refused("images", "1 of 1"):
        generate_batch(base, adapter, scenes[:1], 0, Sampling(steps=1), GenerationSettings())


@pytest.mark.parametrize("method", ["t2i", "prime-paper", "slim"])
def test_each_method_generates_every_scene_and_differs_from_the_base(base, scenes, plain, method):
    adapter = load_adapter(method)
    images = generate(base, adapter, scenes, SAMPLING)
    assert [image.shape for image in images] == [(128, 128, 3)] * 3
    assert all(image.dtype == np.uint8 for image in images)
    assert not any(np.array_equal(ours, alone) for ours, alone in zip(images, plain, strict=True))


def built_for(pipe, name, **options):
    """The untrained adapter of a method."""
    method, (known, unet) = find_method(name), base_of(pipe)
    return method.build(known, unet, method.Options(name, **options))


def controlnet(base):
    """One whose last layers are not zero, as after training."""
    torch.manual_seed(0)
    built = built_for(base, "controlnet")
    with torch.no_grad():
        for layer in (built.controlnet_mid_block, *built.controlnet_down_blocks):
            layer.weight.add_(0.3 * torch.randn_like(layer.weight))
    return built.eval()


def test_a_controlnet_acts(base, scenes, plain):
    images = generate(base, controlnet(base), scenes, SAMPLING)
    assert not any(np.array_equal(ours, alone) for ours, alone in zip(images, plain, strict=True))


def controlnet_xs(base):
    """One whose zero layers are not zero any more."""
    torch.manual_seed(1)
    built = built_for(base, "controlnet-xs", **SIZES["controlnet-xs"])
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def test_a_controlnet_xs_acts_and_leaves_the_base_as_it_was(base, scenes, plain):
    images = generate(base, controlnet_xs(base), scenes, SAMPLING)
    again = generate(base, None, scenes, SAMPLING)
    assert not any(np.array_equal(ours, alone) for ours, alone in zip(images, plain, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(plain, again, strict=True))


def generated_directly(base, adapter, scenes, guidance_scale):
    """By the stock pipelines alone, in one call."""
    arguments = {
        "prompt": [scene.prompt for scene in scenes],
        "latents": initial_latents(len(scenes), (4, 16, 16), seed=5),
        "num_inference_steps": 2,
        "guidance_scale": guidance_scale,
        "output_type": "np",
    }
    maps = [scene.condition for scene in scenes]
    if isinstance(adapter, T2IAdapter):
        parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
        pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
        return tiny.quiet(pipe)(**arguments, image=maps).images
    if isinstance(adapter, ControlNetModel):
        pipe = StableDiffusionControlNetPipeline.from_pipe(base, controlnet=adapter)
        return tiny.quiet(pipe)(**arguments, image=maps).images
    if adapter is None:
        return base(**arguments).images
    with attach(base, Control(adapter, maps)):
        return base(**arguments).images


@pytest.mark.parametrize(
    ("method", "guidance_scale"),
    [
        *((method, 2.0) for method in (None, "t2i", "prime", "controlnet")),
        ("prime", 1.0),
        *(pytest.param(method, 1.0, marks=pytest.mark.full) for method in (None, "t2i", "controlnet")),
    ],
)
def test_every_method_gets_the_same_noise_prompts_maps_and_guidance(base, scenes, method, guidance_scale):
    adapter = controlnet(base) if method == "controlnet" else method and load_adapter(method)
    sampling = Sampling(steps=2, guidance_scale=guidance_scale, seed=5, batch_size=2)
    images = generate(base, adapter, scenes, sampling)
    expected = np.rint(generated_directly(base, adapter, scenes, guidance_scale) * 255)
    for ours, direct in zip(images, expected, strict=True):
        assert np.abs(ours - direct).max() <= 1


def test_batches_do_not_matter(base, scenes):
    adapter = load_adapter("prime")
    in_twos = generate(base, adapter, scenes, SAMPLING)
    at_once = generate(base, adapter, scenes, Sampling(steps=2, batch_size=3))
    for one, other in zip(in_twos, at_once, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("method", [None, "t2i", "prime"])
def test_samplers_that_add_noise_in_every_step_repeat_themselves(base, scenes, method):
    before = base.scheduler
    base.scheduler = EulerAncestralDiscreteScheduler.from_config(before.config)
    try:
        adapter = method and load_adapter(method)
        sampling = Sampling(steps=3, batch_size=2)
        first = generate(base, adapter, scenes, sampling)
        torch.manual_seed(123)
        again = generate(base, adapter, scenes, sampling)
        alone = generate_batch(base, adapter, scenes[2:], 2, sampling, GenerationSettings())
    finally:
        base.scheduler = before
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert np.abs(first[2].astype(int) - alone[0]).max() <= 1


def test_a_t2i_adapter_of_one_channel_reads_grey_maps(base, scenes, plain):
    torch.manual_seed(0)
    channels = list(base.unet.config.block_out_channels)
    adapter = T2IAdapter(in_channels=1, channels=channels, num_res_blocks=2, downscale_factor=8)
    images = generate(base, adapter, scenes, SAMPLING)
    assert not any(np.array_equal(ours, alone) for ours, alone in zip(images, plain, strict=True))


def test_the_policy_reaches_the_adapter(base, scenes):
    adapter = load_adapter("prime")
    images = [
        generate(base, adapter, scenes, SAMPLING, GenerationSettings(policy=policy))
        for policy in ("positive", "per_branch")
    ]
    assert not any(np.array_equal(one, other) for one, other in zip(*images, strict=True))


def test_the_adapter_alone_can_read_another_prompt(base, scenes):
    adapter = load_adapter("prime")
    own = generate(base, adapter, scenes, SAMPLING)
    prompts = [scene.prompt for scene in scenes]
    same, other = (
        generate(base, adapter, scenes, SAMPLING, GenerationSettings(adapter_prompts=read))
        for read in (prompts, ["red cat"] * 3)
    )
    assert all(np.array_equal(a, b) for a, b in zip(own, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(own, other, strict=True))
    assert generate(base, adapter, scenes, SAMPLING)[0].tolist() == own[0].tolist()  # and reads its own again


@pytest.mark.parametrize("method", ["t2i", "controlnet", "controlnet-xs"])
def test_other_prompts_need_an_adapter_that_reads(base, scenes, method):
    adapter = load_adapter("t2i") if method == "t2i" else built_for(base, method, **SIZES.get(method, {}))
    settings = GenerationSettings(adapter_prompts=["a"] * 3)
    with refused("adapter_prompts", "2", expected=find_method(method).label):
        generate(base, adapter, scenes, SAMPLING, settings)


def test_reconstructions_are_the_autoencoders(base, scenes):
    images = reconstruct(base.vae, scenes, batch_size=2)
    pixels = torch.from_numpy(scenes[0].rendering.image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = base.vae.decode(base.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    shown = ((expected[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert len(images) == 3
    assert np.abs(images[0].astype(int) - shown.astype(int)).max() <= 1


@pytest.mark.parametrize("method", ["t2i", "prime"])
def test_a_noise_exponent_acts_on_both_kinds_of_features(base, scenes, method):
    adapter = load_adapter(method)
    plain, as_trained, faded = (
        generate_batch(base, adapter, scenes[:1], 0, SAMPLING, GenerationSettings(noise_exponent=exponent))[0]
        for exponent in (0.0, None, 1.0)
    )
    assert np.array_equal(plain, as_trained)
    with attach(base, Control(adapter, [scenes[0].condition], noise_exponent=1.0)):
        latents = initial_latents(1, (4, 16, 16), SAMPLING.seed)
        arguments = {"num_inference_steps": 2, "guidance_scale": SAMPLING.guidance_scale, "output_type": "np"}
        (expected,) = base(scenes[0].prompt, latents=latents, **arguments).images
    assert np.abs(faded - expected * 255).max() <= 1
    assert not np.array_equal(faded, plain)
    adapter.register_to_config(noise_exponent=1.0)
    (own,) = generate_batch(base, adapter, scenes[:1], 0, SAMPLING, GenerationSettings())
    assert np.array_equal(own, faded)


@pytest.mark.parametrize("method", ["t2i", "prime"])
def test_a_policy_acts_on_both_kinds_of_features(base, scenes, method):
    adapter = load_adapter(method)
    by_policy = {
        policy: generate_batch(base, adapter, scenes[:1], 0, SAMPLING, GenerationSettings(policy=policy))[0]
        for policy in ("positive", "per_branch", "cond_only")
    }
    with attach(base, Control(adapter, [scenes[0].condition], policy="cond_only")):
        latents = initial_latents(1, (4, 16, 16), SAMPLING.seed)
        arguments = {"num_inference_steps": 2, "guidance_scale": SAMPLING.guidance_scale, "output_type": "np"}
        (expected,) = base(scenes[0].prompt, latents=latents, **arguments).images
    assert np.abs(by_policy["cond_only"] - expected * 255).max() <= 1
    assert not np.array_equal(by_policy["cond_only"], by_policy["positive"])
    reads_no_text = method == "t2i"
    assert np.array_equal(by_policy["per_branch"], by_policy["positive"]) == reads_no_text


def test_noise_of_a_row_depends_on_nothing_but_seed_and_row():
    few, many = initial_latents(2, (4, 8, 8), seed=0), initial_latents(5, (4, 8, 8), seed=0)
    assert torch.equal(few, many[:2])
    assert torch.equal(initial_latents(2, (4, 8, 8), seed=0, first=3), many[3:])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(few, initial_latents(2, (4, 8, 8), seed=1))
