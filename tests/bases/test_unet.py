"""UNets as bases: where features go, against real diffusers UNets, and what text, images and noise become."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import FrozenDict
from tests import tiny
from tests.refusals import refused
from torch import nn

from nexus_adapters.bases.families import base_of
from nexus_adapters.bases.unet import KEYWORD, UNetBase

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
WIDTHS = (16, 32, 48, 48)

# Of every kind: with and without a middle feature, with plain blocks first, in the middle and last.
UNETS = {
    (CROSS, CROSS, CROSS, PLAIN): (1, 2, 4, 8),
    (PLAIN, CROSS, CROSS): (2, 2, 4, 4),
    (CROSS, CROSS, PLAIN): (1, 2, 4, 4),
    (PLAIN, PLAIN, CROSS, PLAIN): (2, 4, 4, 8),
    (CROSS, PLAIN, CROSS, CROSS): (1, 4, 4, 8),
    (CROSS, PLAIN, PLAIN): (1, 4, 4, 4),
    (CROSS, CROSS): (1, 2),
    (CROSS,): (1,),
}
STABLE_DIFFUSION = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
    },
}


def build_unet(*down_block_types: str, **changes: Any) -> UNet2DConditionModel:
    """A small real UNet of these down blocks; up blocks mirror them."""
    torch.manual_seed(0)
    arguments = {
        "sample_size": 16,
        "down_block_types": down_block_types,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down_block_types)),
        "block_out_channels": WIDTHS[: len(down_block_types)],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    return UNet2DConditionModel(**{**arguments, **changes}).eval()


def base(unet: Any) -> UNetBase:
    found, denoiser = base_of(unet)
    assert denoiser is unet
    assert isinstance(found, UNetBase)
    return found


@pytest.mark.parametrize("types", UNETS, ids="-".join)
@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
@pytest.mark.parametrize("padding", [1, 0])
@torch.no_grad()
def test_every_feature_lands_where_the_unet_adds_it(types, size, padding):
    unet = build_unet(*types, downsample_padding=padding)
    known = base(unet)
    places = known.places()
    assert tuple(place.stride for place in places) == UNETS[types]
    assert {(place.keyword, place.module, place.layout) for place in places} == {(KEYWORD, "", "map")}
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(1, place.channels, *sides, generator=generator)
        for place, sides in zip(places, known.feature_sizes(*size), strict=True)
    ]
    text, sample = torch.randn(1, 5, 12), torch.randn(1, 4, *size)
    without = unet(sample, 1, text).sample
    for place in range(len(features)):
        # Alone in its place, each must fit and change the result; diffusers pops what it has used.
        given = [f if i == place else torch.zeros_like(f) for i, f in enumerate(features)]
        changed = unet(sample, 1, text, **{KEYWORD: given}).sample
        assert given == []
        assert not torch.equal(changed, without)


@pytest.mark.parametrize(
    ("name", "channels", "strides", "text_width"),
    [
        ("sd1", (320, 640, 1280, 1280), (1, 2, 4, 8), 768),
        ("sd2", (320, 640, 1280, 1280), (1, 2, 4, 8), 1024),
        ("sdxl", (320, 640, 1280, 1280), (2, 2, 4, 4), 2048),
    ],
)
def test_stable_diffusion(name, channels, strides, text_width):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**STABLE_DIFFUSION[name])
    known = base(unet)
    assert tuple((place.channels, place.stride) for place in known.places()) == tuple(
        zip(channels, strides, strict=True)
    )
    assert known.text_width == text_width
    assert UNetBase(known.config, {"block_out_channels": (1, 2, 3, 4)}).size_multiple == 8 * max(strides)
    empty = known.empty_denoiser()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in unet.named_parameters()
    }


def test_residual_blocks_of_old_configs():
    """Early checkpoints prefix the names of their blocks."""
    unet = build_unet(CROSS, PLAIN)
    config = dict(unet.config, down_block_types=(f"UNetRes{CROSS}", f"UNetRes{PLAIN}"))
    assert [p.stride for p in UNetBase(config).places()] == [p.stride for p in base(unet).places()]


@pytest.mark.parametrize(
    "name",
    ["SimpleCrossAttnDownBlock2D", "KCrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
)
def test_block_types_without_features_are_named(name):
    config = dict(build_unet(PLAIN, CROSS, CROSS).config, down_block_types=(PLAIN, name, CROSS))
    with refused("unet", f"{name} as down block 2 of 3", expected=CROSS):
        UNetBase(config).places()


def test_a_real_unet_of_an_unfit_type_is_refused():
    unet = build_unet("SimpleCrossAttnDownBlock2D", PLAIN, attention_head_dim=8)
    with refused("unet", "SimpleCrossAttnDownBlock2D as down block 1 of 2"):
        base(unet).places()


def test_three_blocks_without_a_middle_are_refused():
    with refused("unet", "mid_block_type=None", expected="three down blocks"):
        base(build_unet(CROSS, CROSS, PLAIN, mid_block_type=None)).places()
    assert len(base(build_unet(CROSS, PLAIN, mid_block_type=None)).places()) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"cross_attention_dim": 768}, 768),
        ({"cross_attention_dim": [640, 640]}, 640),
        ({"cross_attention_dim": 2048, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, 4096),
        (
            {"cross_attention_dim": 768, "encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_image_proj"},
            1024,
        ),
        ({"cross_attention_dim": 768, "encoder_hid_dim_type": "ip_image_proj"}, 768),
        (
            {"cross_attention_dim": 2048, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "ip_image_proj"},
            4096,
        ),
    ],
)
def test_text_width(config, expected):
    assert UNetBase({"encoder_hid_dim": None, "encoder_hid_dim_type": None, **config}).text_width == expected


@torch.no_grad()
def test_text_width_of_a_real_text_projection():
    unet = build_unet(CROSS, PLAIN, encoder_hid_dim=20)
    assert base(unet).text_width == 20
    assert unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 20)).sample.shape == (1, 4, 8, 8)


def test_texts_of_several_widths_or_none_are_refused():
    config = {"encoder_hid_dim": None, "encoder_hid_dim_type": None, "cross_attention_dim": [768, 1024]}
    with refused("unet", "cross_attention_dim=(768, 1024)"):
        _ = UNetBase(config).text_width
    with refused("unet", "encoder_hid_dim_type='image_proj'"):
        _ = UNetBase({**config, "encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj"}).text_width


def test_what_is_no_unet_of_this_kind():
    unconditional = UNet2DModel(
        block_out_channels=(8, 8), down_block_types=(PLAIN, PLAIN), up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    for other in (unconditional, nn.Linear(1, 1)):
        with refused("pipe_or_denoiser", f"a {type(other).__name__}", expected="UNet2DConditionModel"):
            base_of(other)


def test_latent_sizes():
    known = base(tiny.unet())
    assert known.latent_size(torch.zeros(2, 4, 5, 7), {}) == (5, 7)
    with refused("sample", "(4, 5, 7)", expected="(B, C, H, W)"):
        known.latent_size(torch.zeros(4, 5, 7), {})


# What can be trained and generated with as a text-to-image base.

VAE = {"latent_channels": 4, "block_out_channels": (4, 4, 4, 4)}


def check(unet=None, vae=None, scheduler=None):
    UNetBase(tiny.unet(**(unet or {})).config, VAE | (vae or {}), scheduler).check("my-base")


def test_a_text_to_image_base():
    check()
    check(scheduler=tiny.scheduler())
    check(scheduler=DDIMScheduler(prediction_type="v_prediction"))
    check(vae={"latents_mean": None, "latents_std": None})


@pytest.mark.parametrize(
    ("changes", "received", "expected"),
    [
        ({"unet": {"in_channels": 9}}, "9 and 4", "4 input and output channels"),
        ({"unet": {"in_channels": 8}}, "8 and 4", "4 input and output channels"),
        ({"vae": {"latent_channels": 16}}, "4 and 4", "16 input and output channels"),
        ({"vae": {"latents_mean": [0.0] * 4}}, "which has one", "latents_mean"),
        ({"vae": {"latents_std": [1.0] * 4}}, "which has one", "latents_std"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "my-base", "betas"),
        ({"scheduler": DDIMScheduler(prediction_type="sample")}, "'sample'", "epsilon or v_prediction"),
    ],
)
def test_what_is_no_text_to_image_base(changes, received, expected):
    with refused("base", received, expected=expected) as caught:
        check(**changes)
    assert "my-base" in str(caught.value)


# Text and images.


@torch.no_grad()
def test_prompts():
    pipe = tiny.sd15()
    encoded = base_of(pipe)[0].encode_prompts(["a red star", "photo of a dog"])
    assert list(encoded) == ["prompt_embeds"]
    expected, _ = pipe.encode_prompt(["a red star", "photo of a dog"], "cpu", 1, False)
    assert torch.equal(encoded["prompt_embeds"], expected)
    known, _ = base_of(pipe.to(torch.bfloat16))
    assert known.encode_prompts(["a"])["prompt_embeds"].dtype == torch.float32
    empty = known.encode_empty_prompt()["prompt_embeds"]
    assert torch.equal(empty, known.encode_prompts([""])["prompt_embeds"])


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_of_sdxl(zeros):
    pipe = tiny.sdxl(force_zeros_for_empty_prompt=zeros)
    known, _ = base_of(pipe)
    encoded = known.encode_prompts(["a red star", "photo of a dog"])
    expected, _, pooled, _ = pipe.encode_prompt(
        ["a red star", "photo of a dog"], num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(encoded["prompt_embeds"], expected)
    assert torch.equal(encoded["text_embeds"], pooled)
    assert encoded["prompt_embeds"].shape[-1] == known.text_width
    empty = known.encode_empty_prompt()
    assert set(empty) == set(encoded)
    assert all(bool(tensor.any()) is not zeros for tensor in empty.values())
    example = known.example_added(2, torch.float32)
    assert example["text_embeds"].shape == encoded["text_embeds"].shape
    assert example["time_ids"].shape == (2, 6)
    assert set(known.added_arguments(example)["added_cond_kwargs"]) == {"text_embeds", "time_ids"}


@torch.no_grad()
def test_images_become_latents_of_unit_variance():
    pipe = tiny.sd15()
    known, _ = base_of(pipe)
    pixels = tiny.condition(2) * 2 - 1
    mean, deviation = known.encode_images(pixels)
    encoded = pipe.vae.encode(pixels).latent_dist
    factor = pipe.vae.config.scaling_factor
    assert torch.allclose(mean, encoded.mean * factor)
    assert torch.allclose(deviation, encoded.std * factor)
    assert mean.shape == (2, 4, 8, 8)
    pipe.vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(known.encode_images(pixels)[0], (encoded.mean - 0.25) * factor, atol=1e-6)


def test_the_hash_is_of_encoders_and_words():
    def hashed(**changes):
        return base_of(tiny.sd15(**changes))[0].content_hash()

    first = hashed()
    assert hashed() == first
    assert hashed(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1)) == first
    other = tiny.text_encoder()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert hashed(text_encoder=other) != first
    more = tiny.tokenizer()
    more.add_tokens(["purple"])
    assert hashed(tokenizer=more) != first


# What a config says of its own history decides nothing.
ORIGIN = ("_name_or_path", "transformers_version", "_use_default_values")


def other(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else ["other"] if value is None else f"{value}-"


def test_every_entry_of_an_encoders_config_is_in_the_hash():
    pipe = tiny.sdxl()
    pipe.unet = None  # as in training
    known = UNetBase({}, None, None, pipe)
    first = known.content_hash()
    walked = 0
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        for key, value in encoder.config.to_dict().items():
            if key == "dtype" or key not in vars(encoder.config):  # of the weights, or of the class
                continue
            vars(encoder.config)[key] = other(value)
            assert (known.content_hash() == first) == (key in ORIGIN), key
            vars(encoder.config)[key] = value
            walked += 1
    before = pipe.vae._internal_dict
    for key, value in dict(before).items():
        pipe.vae._internal_dict = FrozenDict({**before, key: other(value)})
        assert (known.content_hash() == first) == (key in ORIGIN), key
        walked += 1
    pipe.vae._internal_dict = before
    assert known.content_hash() == first
    assert walked > 60


@tiny.writes_fast_tokenizers
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_whatever_a_tokenizer_does_to_a_text_is_in_the_hash(name):
    pipe = tiny.sdxl()
    known = UNetBase({}, None, None, pipe)
    first = known.content_hash()
    tokenizer = getattr(pipe, name)
    tokenizer("a red star", truncation=True, max_length=4, padding="max_length")
    assert known.content_hash() == first  # a call leaves no trace
    for key, value in (("model_max_length", 8), ("padding_side", "left"), ("truncation_side", "left")):
        before = getattr(tokenizer, key)
        setattr(tokenizer, key, value)
        assert known.content_hash() != first, key
        setattr(tokenizer, key, before)
    tokenizer.backend_tokenizer.normalizer = None  # keeps capitals
    assert known.content_hash() != first


def test_release():
    known, _ = base_of(tiny.sd15())
    known.release()
    assert known.pipe is None
    assert known.scheduler is not None


# Noise.


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_what_is_predicted(kind):
    scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    known = UNetBase(tiny.SD15_UNET, VAE, scheduler)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.tensor([10, 900])
    noisy, target = known.noised(latents, noise, t)
    share = scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    assert torch.allclose(noisy, share.sqrt() * latents + (1 - share).sqrt() * noise, atol=1e-6)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * latents
    assert torch.allclose(target, noise if kind == "epsilon" else velocity, atol=1e-6)
    assert known.num_train_timesteps == 1000
    ratio = (share / (1 - share)).flatten()
    weights = ratio.clamp(max=5) / (ratio if kind == "epsilon" else ratio + 1)
    assert torch.allclose(known.loss_weights(t, 5.0), weights, rtol=1e-3)


def test_another_prediction_is_refused():
    known = UNetBase(tiny.SD15_UNET, VAE, DDIMScheduler(prediction_type="sample"))
    ones = torch.ones(1, 4, 8, 8)
    with refused("scheduler.prediction_type", "'sample'", expected="epsilon or v_prediction"):
        known.noised(ones, ones, torch.tensor([1]))


@torch.no_grad()
def test_the_prediction_is_the_unets():
    unet = tiny.unet()
    noisy, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, tiny.TEXT_WIDTH), torch.tensor([3, 700])
    found = base(unet).predict(unet, noisy, t, text, {})
    assert torch.equal(found, unet(noisy, t, text).sample)


@pytest.mark.parametrize(("sample_size", "side"), [(64, 64), ([64, 64], 64), ((48, 80), 62), (None, 64)])
def test_the_size_that_a_base_was_trained_on(sample_size, side):
    base = UNetBase({"sample_size": sample_size}, {"block_out_channels": (4, 4, 4, 4)})
    assert base.native_size() == 8 * side
