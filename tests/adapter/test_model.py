import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from tests.refusals import refused
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nexus_adapters
from nexus_adapters.adapter.model import NexusAdapter

Build = Callable[..., NexusAdapter]
Inputs = Callable[..., tuple[Tensor, Tensor]]
Unets = dict[str, UNet2DConditionModel]

T2I = {
    "sd1": ({"adapter_type": "full_adapter", "downscale_factor": 8}, 77_369_280),
    "sdxl": ({"adapter_type": "full_adapter_xl", "downscale_factor": 16}, 79_028_160),
}


def on_meta(full_unets: Unets, base: str, variant: str, **overrides: Any) -> NexusAdapter:
    with torch.device("meta"):
        return NexusAdapter.for_unet(full_unets[base], variant, **overrides)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("base", "variant", "parameters", "against_t2i"),
    [
        ("sd1", "prime", 85_817_600, 8_448_320),
        ("sd1", "slim", 59_288_960, -18_080_320),
        ("sdxl", "prime", 94_030_080, 15_001_920),
        ("sdxl", "slim", 67_501_440, -11_526_720),
    ],
)
def test_parameter_counts(
    full_unets: Unets, base: str, variant: str, parameters: int, against_t2i: int
) -> None:
    for name in (variant, f"{variant}-paper"):  # a residual connection has no weights
        adapter = on_meta(full_unets, base, name)
        assert (adapter.variant, adapter.config.residual) == (name, name == variant)
        assert count(adapter) == parameters
    arguments, t2i_parameters = T2I[base]
    with torch.device("meta"):
        t2i = T2IAdapter(in_channels=3, channels=[320, 640, 1280, 1280], num_res_blocks=2, **arguments)
    assert count(t2i) == t2i_parameters
    assert parameters - t2i_parameters == against_t2i


@pytest.mark.parametrize(
    ("base", "side", "sides"), [("sd1", 512, (64, 32, 16, 8)), ("sdxl", 1024, (64, 64, 32, 32))]
)
@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_feature_shapes_at_full_size(
    full_unets: Unets, base: str, side: int, sides: tuple[int, ...], variant: str
) -> None:
    adapter = on_meta(full_unets, base, variant)
    condition = torch.zeros(2, 3, side, side, device="meta")
    text = torch.zeros(2, 77, adapter.config.text_width, device="meta")
    shapes = [tuple(feature.shape) for feature in adapter(condition, text)]
    assert shapes == [(2, width, s, s) for width, s in zip((320, 640, 1280, 1280), sides, strict=True)]
    assert (adapter.config.heads, adapter.config.head_width) == (10, 64)


@pytest.mark.parametrize(("variant", "giga_macs"), [("prime", 33.83), ("slim", 24.29)])
def test_work_of_one_forward(full_unets: Unets, variant: str, giga_macs: float) -> None:
    adapter = on_meta(full_unets, "sd1", variant)
    inputs = torch.zeros(1, 3, 512, 512, device="meta"), torch.zeros(1, 77, 768, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter(*inputs)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.005)


def release_names(variant: str, widened: tuple[int, ...], stages: int = 4) -> list[str]:
    names = ["conv_in.weight", "conv_in.bias"]
    block1 = {"prime": ["weight", "bias"], "slim": ["gwc.weight", "pwc.weight"]}[variant]
    for i in range(stages):
        if i in widened:
            names += [f"body.{i}.in_conv.weight", f"body.{i}.in_conv.bias"]
        for j in range(2):
            names += [f"body.{i}.resnets.{j}.block1.{name}" for name in block1]
            names += [f"body.{i}.resnets.{j}.block2.{name}" for name in ("weight", "bias")]
        names += [f"body.{i}.norm1.weight", f"body.{i}.norm1.bias"]
        names += [f"body.{i}.cross_attention.to_{x}.weight" for x in "qkv"]
        names += [f"body.{i}.cross_attention.to_out.0.{name}" for name in ("weight", "bias")]
    return [f"adapter.{name}" for name in names]


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
@pytest.mark.parametrize("variant", ["prime", "slim"])
def test_state_dict_names_are_the_releases(full_unets: Unets, base: str, variant: str) -> None:
    for name in (variant, f"{variant}-paper"):
        adapter = on_meta(full_unets, base, name)
        assert list(adapter.state_dict()) == release_names(variant, widened=(1, 2))


def test_state_dict_holds_t2i_adapters(full_unets: Unets) -> None:
    with torch.device("meta"):
        t2i = T2IAdapter(in_channels=3).state_dict()
    ours = on_meta(full_unets, "sd1", "prime").state_dict()
    assert {name: tensor.shape for name, tensor in t2i.items()} == {
        name: tensor.shape for name, tensor in ours.items() if "norm1" not in name and "attention" not in name
    }


def test_variant_is_the_name_of_the_configuration(tiny: Build) -> None:
    assert [tiny(groups=groups, residual=True).variant for groups in (1, 2, 4)] == ["prime", "slim", "slim"]
    assert [tiny(groups=groups).variant for groups in (1, 2, 4)] == ["prime-paper"] + 2 * ["slim-paper"]


def test_a_name_and_overrides_make_the_configuration(
    build_unet: Callable[..., UNet2DConditionModel],
) -> None:
    unet = build_unet("CrossAttnDownBlock2D", "DownBlock2D")
    assert NexusAdapter.for_unet(unet).variant == "prime"
    assert NexusAdapter.for_unet(unet, "prime", residual=False).variant == "prime-paper"
    assert NexusAdapter.for_unet(unet, "slim", residual=False, groups=4).variant == "slim-paper"
    assert NexusAdapter.for_unet(unet, "slim-paper", groups=4, residual=False).config.groups == 4


def test_overrides(build_unet: Callable[..., UNet2DConditionModel]) -> None:
    unet = build_unet("CrossAttnDownBlock2D", "DownBlock2D")
    adapter = NexusAdapter.for_unet(
        unet,
        "slim",
        groups=4,
        in_channels=1,
        zero_init=True,
        heads=3,
        head_width=5,
        noise_exponent=1,
    )
    assert {name: value for name, value in adapter.config.items() if name[0] != "_"} == {
        "in_channels": 1, "channels": (16, 32), "pools": (False, True), "unshuffle": 8, "groups": 4,
        "text_width": 12, "heads": 3, "head_width": 5, "residual": True, "zero_init": True,
        "noise_exponent": 1, "block": "paper", "block_options": {},
    }  # fmt: skip
    assert NexusAdapter.for_unet(unet, unshuffle=4).config.unshuffle == 4
    assert NexusAdapter.for_unet(unet, vae_scale_factor=16).config.unshuffle == 16


@pytest.mark.parametrize(
    ("variant", "overrides", "name", "received"),
    [
        ("light", {}, "variant", "'light'"),
        ("prime", {"head": 2, "dim": 1}, "overrides", "dim, head"),
        ("prime", {"groups": 2}, "groups", "2"),
        ("slim", {"groups": 1}, "groups", "1"),
        ("slim", {"groups": 5}, "groups", "5"),
        ("slim-paper", {"residual": True}, "residual", "True"),
        ("prime-paper", {"zero_init": True}, "zero_init", "True"),
        ("prime", {"zero_init": True, "residual": False}, "zero_init", "True"),
        ("prime", {"vae_scale_factor": 0}, "vae_scale_factor", "0"),
        ("prime", {"channels": 8}, "channels", "8"),
        ("prime", {"channels": ()}, "channels", "()"),
        ("prime", {"block": "none"}, "block", "'none'"),
    ],
)
def test_bad_overrides_are_named(
    build_unet: Callable[..., UNet2DConditionModel],
    variant: str,
    overrides: dict[str, Any],
    name: str,
    received: str,
) -> None:
    with refused(name, received):
        NexusAdapter.for_unet(build_unet("CrossAttnDownBlock2D", "DownBlock2D"), variant, **overrides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 1), ("channels", (8, 16, 8)), ("pools", (False, False, True)), ("unshuffle", 8),
        ("groups", 2), ("text_width", 20), ("heads", 1), ("head_width", 8), ("residual", True),
    ],
)  # fmt: skip
def test_every_argument_has_an_effect(tiny: Build, inputs: Inputs, name: str, value: Any) -> None:
    def features(adapter: NexusAdapter) -> list[Tensor]:
        condition, text = inputs(in_channels=adapter.config.in_channels)
        return adapter(condition, torch.nn.functional.pad(text, (0, adapter.config.text_width - 12)))

    before, after = features(tiny()), features(tiny(**{name: value}))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_zero_init_gives_features_that_ignore_the_text(tiny: Build, inputs: Inputs) -> None:
    condition, text = inputs()
    adapter = tiny(residual=True, zero_init=True)
    for feature, other in zip(adapter(condition, text), adapter(condition, -text), strict=True):
        assert torch.equal(feature, other)
        assert feature.abs().sum() > 0
    for feature, other in zip(tiny()(condition, text), tiny()(condition, -text), strict=True):
        assert not torch.allclose(feature, other)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (36, 28)])
def test_sizes_need_only_be_multiples_of_the_stem(
    tiny: Build, inputs: Inputs, height: int, width: int
) -> None:
    adapter = tiny()
    for feature, stride in zip(adapter(*inputs(1, height, width)), (4, 8, 16), strict=True):
        assert feature.shape[2:] == (-(-height // stride), -(-width // stride))


def test_bad_input_is_refused_before_it_is_computed_with(tiny: Build, inputs: Inputs) -> None:
    condition, text = inputs()
    with refused("condition", "30x32", expected="multiples of 4"):
        tiny()(condition[:, :, :30], text)
    with refused("prompt_embeds", "1", expected="batch of 2"):
        tiny()(condition, text[:1])
    with refused("condition", "(3, 32, 32)"):
        tiny()(condition[0], text)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_a_batch_equals_its_singles(tiny: Build, inputs: Inputs, groups: int) -> None:
    adapter, (condition, text) = tiny(groups=groups), inputs(batch=3)
    for i, together in enumerate(zip(*adapter(condition, text), strict=True)):
        alone = adapter(condition[i : i + 1], text[i : i + 1])
        for feature, single in zip(together, alone, strict=True):
            torch.testing.assert_close(feature, single[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(tiny: Build, inputs: Inputs, groups: int) -> None:
    def gradients(adapter: NexusAdapter) -> dict[str, Tensor]:
        condition, text = inputs()
        text.requires_grad_()
        sum(feature.square().mean() for feature in adapter(condition, text)).backward()
        found = {name: parameter.grad for name, parameter in adapter.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        return {**found, "text": text.grad}

    plain, checkpointed = tiny(groups=groups).train(), tiny(groups=groups).train()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    calls = []
    inner = checkpointed.adapter._gradient_checkpointing_func
    checkpointed.adapter._gradient_checkpointing_func = lambda *args: calls.append(1) or inner(*args)
    torch.testing.assert_close(gradients(checkpointed), gradients(plain), rtol=1e-5, atol=1e-7)
    assert len(calls) == 3
    checkpointed.disable_gradient_checkpointing()
    assert not checkpointed.is_gradient_checkpointing


def test_autocast_and_half_precision(tiny: Build, inputs: Inputs) -> None:
    condition, text = inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(feature.isfinite().all() for feature in tiny()(condition, text))
    features = tiny().to(torch.bfloat16)(condition.bfloat16(), text.bfloat16())
    assert {feature.dtype for feature in features} == {torch.bfloat16}


@pytest.fixture
def _untyped() -> Iterator[None]:
    """Turns off the import hook's checks, which cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_untyped")
def test_compiles_to_one_graph(tiny: Build, inputs: Inputs) -> None:
    adapter = tiny()
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), adapter(*inputs()))


def test_class_is_known_under_its_public_name(tiny: Build, inputs: Inputs) -> None:
    assert NexusAdapter.__module__ == "nexus_adapters"
    assert nexus_adapters.NexusAdapter is NexusAdapter
    adapter = tiny()
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert type(twin) is NexusAdapter
        assert twin.config == adapter.config
        torch.testing.assert_close(twin(*inputs()), adapter(*inputs()), rtol=0, atol=0)
