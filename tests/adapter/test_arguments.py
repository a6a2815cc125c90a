import inspect
from typing import Any

import pytest
import torch

from nexus_adapters import NexusAdapter
from nexus_adapters.adapter.arguments import (
    OPTIONAL_ARGUMENTS,
    attention_heads,
    check_arguments,
    check_config,
)
from nexus_adapters.adapter.inputs import check_inputs

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
    ("name", "value", "message"),
    [
        ("in_channels", 0, "positive integer; received 0"),
        ("unshuffle", 8.0, "positive integer; received 8.0"),
        ("groups", None, "positive integer; received None"),
        ("groups", True, "positive integer; received True"),
        ("groups", 3, r"divisor of every width in \(8, 16\); received 3"),
        ("text_width", -1, "positive integer; received -1"),
        ("heads", 0, "positive integer; received 0"),
        ("head_width", "64", "positive integer; received '64'"),
        ("channels", (), r"received \(\)"),
        ("channels", 8, "received 8"),
        ("channels", (8, 0), r"received \(8, 0\)"),
        ("pools", (False,), r"2 entries, as many as channels; received \[False\]"),
        ("pools", (True, True), r"before the first stage .* received \[True, True\]"),
        ("pools", (False, -1), r"received \(False, -1\)"),
        ("pools", (False, 0.5), r"received \(False, 0.5\)"),
        ("residual", 1, "True or False; received 1"),
        ("zero_init", None, "True or False; received None"),
        ("zero_init", True, "received zero_init=True, residual=False"),
        ("noise_exponent", -0.5, "a finite number of at least 0; received -0.5"),
        ("noise_exponent", False, "a finite number of at least 0; received False"),
    ],
)
def test_bad_argument_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*{message}"):
        check_arguments({**GOOD, name: value})


def test_config_of_another_model_is_named() -> None:
    config = {"_class_name": "T2IAdapter", "in_channels": 3, "channels": [8], "adapter_type": "full_adapter"}
    with pytest.raises(
        ValueError, match=r"a T2IAdapter's \(missing: pools, .*head_width; unknown: adapter_type\)"
    ):
        check_config(config)


def test_config_may_leave_out_defaults_and_hold_diffusers_keys() -> None:
    needed = {name: GOOD[name] for name in GOOD if name not in OPTIONAL_ARGUMENTS}
    check_config({**needed, "_diffusers_version": "0.42.0", "quantization_config": None})
    check_config({name: needed[name] for name in needed if name != "heads"}, overridden={"heads": 1})


@pytest.mark.parametrize(
    ("condition", "prompt_embeds", "message"),
    [
        ((1, 3, 16), (1, 5, 12), r"condition: expected \(B, 3, H, W\); received \(1, 3, 16\)"),
        ((1, 1, 16, 16), (1, 5, 12), r"condition: expected \(B, 3, H, W\); received \(1, 1, 16, 16\)"),
        ((1, 3, 16, 20), (1, 5, 12), "condition: .* multiples of 8 .*pad.* received 16x20"),
        ((1, 3, 0, 16), (1, 5, 12), "condition: .* multiples of 8 .* received 0x16"),
        ((1, 3, 16, 16), (5, 12), r"prompt_embeds: expected \(B, N, 12\); received \(5, 12\)"),
        ((1, 3, 16, 16), (1, 5, 7), r"prompt_embeds: expected \(B, N, 12\); received \(1, 5, 7\)"),
        ((1, 3, 16, 16), (1, 0, 12), r"prompt_embeds: expected \(B, N, 12\); received \(1, 0, 12\)"),
        ((2, 3, 16, 16), (3, 5, 12), "prompt_embeds: expected a batch of 2, .*; received 3"),
    ],
)
def test_bad_input_is_named(condition: tuple[int, ...], prompt_embeds: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(condition), torch.zeros(prompt_embeds), GOOD)


def test_integer_condition_is_refused() -> None:
    with pytest.raises(ValueError, match=r"condition: expected floating point .* received torch.uint8"):
        check_inputs(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 5, 12), GOOD)


def test_the_defaults_are_the_models() -> None:
    parameters = inspect.signature(NexusAdapter.__init__).parameters
    assert {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    } == OPTIONAL_ARGUMENTS
