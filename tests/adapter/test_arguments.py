"""An adapter's shapes, from the places of its features. Places in real UNets: tests/bases/test_unet.py."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from tests.refusals import refused
from torch import nn

from nexus_adapters.adapter.arguments import (
    OPTIONAL_ARGUMENTS,
    VARIANTS,
    attention_heads,
    base_geometry,
    check_arguments,
    check_config,
    geometry_from_places,
    variant_arguments,
    variant_of,
)
from nexus_adapters.adapter.model import NexusAdapter, check_inputs
from nexus_adapters.bases.unet import UNetBase

GOOD: dict[str, Any] = {
    "in_channels": 3,
    "channels": (8, 16),
    "pools": (False, True),
    "unshuffle": 8,
    "groups": 2,
    "text_width": 12,
    "heads": 2,
    "head_width": 4,
    "residual": False,
    "zero_init": False,
    "noise_exponent": 0.0,
    "block": "paper",
    "block_options": {},
}


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ((320, 640, 1280, 1280), (10, 64)),
        ((128, 256), (2, 64)),
        ((1280, 64), (10, 64)),
        ((64, 192), (3, 32)),
        ((32, 64), (1, 32)),
        ((32, 100), (1, 50)),
        ((8, 16), (1, 8)),
    ],
)
def test_heads_rule(channels: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert attention_heads(channels) == expected


def test_good_arguments_pass() -> None:
    check_arguments(GOOD)
    check_arguments({**GOOD, "channels": [8, 16], "pools": [0, 2], "residual": True, "zero_init": True})


@pytest.mark.parametrize(
    ("name", "value", "expected", "received"),
    [
        ("in_channels", 0, "positive integer", "0"),
        ("unshuffle", 8.0, "positive integer", "8.0"),
        ("groups", None, "positive integer", "None"),
        ("groups", True, "positive integer", "True"),
        ("groups", 3, "(8, 16)", "3"),
        ("text_width", -1, "positive integer", "-1"),
        ("heads", 0, "positive integer", "0"),
        ("head_width", "64", "positive integer", "'64'"),
        ("channels", (), "positive integer", "()"),
        ("channels", 8, "positive integer", "8"),
        ("channels", (8, 0), "positive integer", "(8, 0)"),
        ("pools", (False,), "2 entries", "[False]"),
        ("pools", (True, True), "no pooling before the first", "[True, True]"),
        ("pools", (False, -1), "number of 2x2 poolings", "(False, -1)"),
        ("pools", (False, 0.5), "number of 2x2 poolings", "(False, 0.5)"),
        ("residual", 1, "True or False", "1"),
        ("zero_init", None, "True or False", "None"),
        ("zero_init", True, "residual=False", "True"),
        ("noise_exponent", -0.5, "at least 0", "-0.5"),
        ("noise_exponent", False, "at least 0", "False"),
        ("block", "", "block", "''"),
        ("block", None, "block", "None"),
        ("block_options", ["gain"], "dict", "['gain']"),
        ("block_options", {1: 2}, "dict", "{1: 2}"),
    ],
)
def test_bad_argument_is_named(name: str, value: Any, expected: str, received: str) -> None:
    with refused(name, received, expected=expected):
        check_arguments({**GOOD, name: value})


def test_the_table_of_names() -> None:
    assert VARIANTS == {
        "prime": {"groups": 1, "residual": True},
        "slim": {"groups": 2, "residual": True},
        "prime-paper": {"groups": 1, "residual": False},
        "slim-paper": {"groups": 2, "residual": False},
    }
    assert [variant_of(**arguments) for arguments in VARIANTS.values()] == list(VARIANTS)
    assert [variant_arguments(name) for name in VARIANTS] == list(VARIANTS.values())


def test_an_override_may_choose_groups_and_the_papers_form() -> None:
    assert variant_of(**variant_arguments("slim", {"groups": 4, "heads": 2})) == "slim"
    assert variant_of(**variant_arguments("prime", {"residual": False})) == "prime-paper"
    assert variant_arguments("slim-paper", {"residual": False, "groups": 8}) == {
        "groups": 8,
        "residual": False,
    }


@pytest.mark.parametrize(
    ("variant", "overrides", "name", "received"),
    [
        ("light", {}, "variant", "'light'"),
        ("prime", {"groups": 2}, "groups", "2"),
        ("prime-paper", {"groups": 2}, "groups", "2"),
        ("slim", {"groups": 1}, "groups", "1"),
        ("slim", {"groups": None}, "groups", "None"),
        ("slim", {"residual": 1}, "residual", "1"),
        ("prime-paper", {"residual": True}, "residual", "True"),
        ("slim-paper", {"residual": True}, "residual", "True"),
    ],
)
def test_an_override_against_the_name_is_refused(
    variant: str, overrides: dict[str, Any], name: str, received: str
) -> None:
    with refused(name, received):
        variant_arguments(variant, overrides)


def test_config_of_another_model_is_named() -> None:
    config = {"_class_name": "T2IAdapter", "in_channels": 3, "channels": [8], "adapter_type": "full_adapter"}
    with refused("config", "T2IAdapter", expected="a NexusAdapter"):
        check_config(config)
    with refused(
        "config", "(missing: pools, unshuffle, text_width, heads, head_width; unknown: adapter_type)"
    ):
        check_config(config)
    with refused("config", "the config of a MyAdapter", hint="MyAdapter.from_pretrained"):
        check_config({**GOOD, "_class_name": "MyAdapter"})


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_config_of_a_newer_format_is_refused(version: object) -> None:
    check_config({**GOOD, "format_version": 1})
    hint = "upgrade" if version == 2 else ""
    with refused("format_version", version if version == 2 else repr(version), hint=hint):
        check_config({**GOOD, "more": "that only newer versions know", "format_version": version})


def test_config_may_leave_out_defaults_and_hold_diffusers_keys() -> None:
    needed = {name: GOOD[name] for name in GOOD if name not in OPTIONAL_ARGUMENTS}
    check_config({**needed, "_diffusers_version": "0.42.0", "quantization_config": None})
    check_config({name: needed[name] for name in needed if name != "heads"}, overridden={"heads": 1})


@pytest.mark.parametrize(
    ("condition", "prompt_embeds", "name", "expected", "received"),
    [
        ((1, 3, 16), (1, 5, 12), "condition", "(B, 3, H, W)", "(1, 3, 16)"),
        ((1, 1, 16, 16), (1, 5, 12), "condition", "(B, 3, H, W)", "(1, 1, 16, 16)"),
        ((1, 3, 16, 20), (1, 5, 12), "condition", "multiples of 8", "16x20"),
        ((1, 3, 0, 16), (1, 5, 12), "condition", "multiples of 8", "0x16"),
        ((1, 3, 16, 16), (5, 12), "prompt_embeds", "(B, N, 12)", "(5, 12)"),
        ((1, 3, 16, 16), (1, 5, 7), "prompt_embeds", "(B, N, 12)", "(1, 5, 7)"),
        ((1, 3, 16, 16), (1, 0, 12), "prompt_embeds", "(B, N, 12)", "(1, 0, 12)"),
        ((2, 3, 16, 16), (3, 5, 12), "prompt_embeds", "batch of 2", "3"),
    ],
)
def test_bad_input_is_named(
    condition: tuple[int, ...], prompt_embeds: tuple[int, ...], name: str, expected: str, received: str
) -> None:
    with refused(name, received, expected=expected):
        check_inputs(torch.zeros(condition), torch.zeros(prompt_embeds), GOOD)


def test_integer_condition_is_refused() -> None:
    with refused("condition", "torch.uint8", expected="floating-point"):
        check_inputs(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 5, 12), GOOD)


def test_the_defaults_are_the_models() -> None:
    parameters = inspect.signature(NexusAdapter.__init__).parameters
    assert {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    } == OPTIONAL_ARGUMENTS


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

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


@pytest.mark.parametrize("types", UNETS, ids="-".join)
@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
@torch.no_grad()
def test_every_feature_lands_where_the_unet_adds_it(
    build_unet: Callable[..., UNet2DConditionModel], types: tuple[str, ...], size: tuple[int, int]
) -> None:
    unet = build_unet(*types)
    adapter = NexusAdapter.for_unet(unet, vae_scale_factor=2)
    unshuffle = adapter.config.unshuffle
    pixels = [-(-2 * side // unshuffle) * unshuffle for side in size]  # padded to the stem's multiple
    text = torch.randn(1, 5, 12)
    features = adapter(torch.rand(1, 3, *pixels), text)
    assert [f.shape[3] for f in features] == [-(-pixels[1] // (2 * stride)) for stride in UNETS[types]]
    sample = torch.randn(1, 4, *size)
    base = unet(sample, 1, text).sample
    for place in range(len(features)):
        # Alone in its place, each must fit and change the result; diffusers pops what it has used.
        given = [f if i == place else torch.zeros_like(f) for i, f in enumerate(features)]
        changed = unet(sample, 1, text, down_intrablock_additional_residuals=given).sample
        assert given == []
        assert not torch.equal(changed, base)


def test_stable_diffusion_1(full_unets: dict[str, UNet2DConditionModel]) -> None:
    assert base_geometry(UNetBase(full_unets["sd1"].config), 8) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, True, True, True),
        "unshuffle": 8,
        "text_width": 768,
    }


def test_stable_diffusion_xl(full_unets: dict[str, UNet2DConditionModel]) -> None:
    assert base_geometry(UNetBase(full_unets["sdxl"].config), 8) == {
        "channels": (320, 640, 1280, 1280),
        "pools": (False, False, True, False),
        "unshuffle": 16,
        "text_width": 2048,
    }


def test_pixels_per_latent_are_those_of_the_bases_autoencoder(
    build_unet: Callable[..., UNet2DConditionModel],
) -> None:
    base = UNetBase(build_unet(PLAIN, CROSS).config, {"block_out_channels": (4, 4, 4)})
    assert base_geometry(base)["unshuffle"] == 2 * 4
    assert base_geometry(base, 3)["unshuffle"] == 2 * 3


def test_real_unet_of_an_unfit_type_is_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet("SimpleCrossAttnDownBlock2D", PLAIN, attention_head_dim=8)
    with refused("unet", "SimpleCrossAttnDownBlock2D as down block 1 of 2"):
        NexusAdapter.for_unet(unet)


def test_three_blocks_without_a_middle_are_refused(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with refused("unet", "mid_block_type=None"):
        NexusAdapter.for_unet(build_unet(CROSS, CROSS, PLAIN, mid_block_type=None))
    assert len(NexusAdapter.for_unet(build_unet(CROSS, PLAIN, mid_block_type=None)).config.channels) == 2


def test_other_classes_are_named(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    with refused("unet", "a Linear", expected="UNet2DConditionModel"):
        NexusAdapter.for_unet(nn.Linear(1, 1))
    other = UNet2DModel(
        block_out_channels=(8, 8), down_block_types=(PLAIN, PLAIN), up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    with refused("unet", "a UNet2DModel"):
        NexusAdapter.for_unet(other)
    pipeline = nn.Module()
    pipeline.unet = build_unet(CROSS)
    with refused("unet", "a Module", hint=".unet"):
        NexusAdapter.for_unet(pipeline)


def test_compiled_unet_is_seen_through(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet(CROSS, PLAIN)
    compiled = torch.compile(unet, backend="eager")
    assert dict(NexusAdapter.for_unet(compiled).config) == dict(NexusAdapter.for_unet(unet).config)


def test_text_widths(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    assert NexusAdapter.for_unet(build_unet(CROSS, PLAIN, encoder_hid_dim=20)).config.text_width == 20
    with refused("unet", "cross_attention_dim=(12, 16)"):
        NexusAdapter.for_unet(build_unet(CROSS, CROSS, cross_attention_dim=(12, 16)))


def test_geometry_of_any_places() -> None:
    assert geometry_from_places((64, 64, 128), (2, 2, 16), text_width=12, pixels_per_latent=8) == {
        "channels": (64, 64, 128), "pools": (False, False, 3), "unshuffle": 16, "text_width": 12,
    }  # fmt: skip
    transformer = geometry_from_places([1536] * 3, [2] * 3, text_width=4096, pixels_per_latent=8)
    assert transformer["pools"] == (False,) * 3
    adapter = NexusAdapter.for_geometry(
        geometry_from_places((8, 16), (1, 4), text_width=12, pixels_per_latent=4), "slim"
    )
    assert adapter.variant == "slim"
    features = adapter(torch.rand(1, 3, 32, 32), torch.randn(1, 5, 12))
    assert [tuple(feature.shape) for feature in features] == [(1, 8, 8, 8), (1, 16, 2, 2)]


@pytest.mark.parametrize(
    ("changes", "name", "received"),
    [
        ({"strides": (2, 1)}, "strides", "1 after 2"),
        ({"strides": (1, 3)}, "strides", "3 after 1"),
        ({"strides": (2, 3)}, "strides", "3 after 2"),
        ({"strides": (1,)}, "strides", "[1]"),
        ({"strides": (0, 1)}, "strides", "0"),
        ({"channels": ()}, "channels", "()"),
        ({"text_width": 0}, "text_width", "0"),
        ({"pixels_per_latent": 0}, "pixels_per_latent", "0"),
    ],
)
def test_places_without_a_geometry_are_named(changes: dict[str, object], name: str, received: str) -> None:
    places = {"channels": (8, 16), "strides": (1, 2), "text_width": 12, "pixels_per_latent": 8}
    with refused(name, received):
        geometry_from_places(**{**places, **changes})


def test_a_geometry_is_whole() -> None:
    with refused("geometry", "channels, more", expected="channels, pools, text_width, unshuffle"):
        NexusAdapter.for_geometry({"channels": (8,), "more": 1})
