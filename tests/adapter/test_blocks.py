"""Blocks that users register: built, trained, saved and loaded by their names."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.refusals import refused
from torch import Tensor, nn

from nexus_adapters.adapter.blocks import BLOCKS, find_block, register_block
from nexus_adapters.adapter.formats import export_file, import_adapter
from nexus_adapters.adapter.model import NexusAdapter
from nexus_adapters.adapter.stage import Stage
from nexus_adapters.cli import main
from nexus_adapters.methods import load_adapter

Build = Callable[..., NexusAdapter]
Inputs = Callable[..., tuple[Tensor, Tensor]]
GROUP = "nexus_adapters.blocks"
TRIALS = ("gate", "gate-level", "first", "film", "twice")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is gone after it."""
    with BLOCKS.temporary():
        yield


class Gained(Stage):
    """A stage with options; what is not its own is handed on."""

    def __init__(
        self,
        *,
        channels: int,
        gain: float,
        widths: tuple[int, ...] = (1,),
        kind: Literal["sum", "mean"] = "sum",
        names: Sequence[str] | None = None,
        **stage: Any,
    ) -> None:
        super().__init__(channels=channels, **stage)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), float(gain)))
        self.widths = widths

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.gain * super().forward(x, prompt_embeds)


class Plain(nn.Module):
    """No `Stage` at all; it wants to know its level."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        pools: int,
        groups: int,
        text_width: int,
        heads: int,
        head_width: int,
        residual: bool,
        zero_init: bool,
        level: int,
        levels: int,
    ) -> None:
        super().__init__()
        self.place = (level, levels)
        self.conv = nn.Conv2d(in_channels, channels, kernel_size=2**pools, stride=2**pools)
        self.text = nn.Linear(text_width, channels)

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.conv(x) + self.text(prompt_embeds.mean(1))[..., None, None]


class Sparse(nn.Module):
    """Tensors of its own where `first` and `last` say, under any names; elsewhere it only resizes."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        pools: int,
        text_width: int,
        level: int,
        levels: int,
        last: bool = False,
        groups: int,
        heads: int,
        head_width: int,
        residual: bool,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.channels, self.side = channels, 2**pools
        if level == (levels - 1 if last else 0):
            self.bank = nn.ParameterDict({"gates": torch.ones(channels, text_width)})
            self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor, prompt_embeds: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, self.side)
        x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        return (
            x * (prompt_embeds.mean(1) @ self.bank["gates"].T)[..., None, None]
            if "bank" in self._modules
            else x
        )


def train(adapter: NexusAdapter, inputs: Inputs) -> list[float]:
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        loss = sum(feature.square().mean() for feature in adapter(*inputs()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_registered_block_trains_saves_and_loads(tiny: Build, inputs: Inputs, tmp_path: Path) -> None:
    register_block("gained")(Gained)
    adapter = tiny(block="gained", block_options={"gain": 2, "widths": (3, 4)}, residual=True)
    assert all(stage.widths == (3, 4) for stage in adapter.adapter.body)
    losses = train(adapter, inputs)
    assert losses == sorted(losses, reverse=True)
    adapter.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["block"], config["block_options"]) == ("gained", {"gain": 2, "widths": [3, 4]})
    export_file(adapter, tmp_path / "one.safetensors")
    for loaded in (
        NexusAdapter.from_pretrained(tmp_path / "folder"),
        import_adapter(tmp_path / "folder").adapter,
        import_adapter(tmp_path / "one.safetensors").adapter,
    ):
        assert loaded.config["block_options"] == adapter.config["block_options"] == config["block_options"]
        assert {type(stage) for stage in loaded.adapter.body} == {Gained}
        torch.testing.assert_close(loaded(*inputs()), adapter(*inputs()), rtol=0, atol=0)


def test_any_module_can_be_a_block_and_is_given_its_level(
    tiny: Build, inputs: Inputs, tmp_path: Path
) -> None:
    register_block("plain")(Plain)
    adapter = tiny(block="plain")
    assert [stage.place for stage in adapter.adapter.body] == [(0, 3), (1, 3), (2, 3)]
    assert adapter._no_split_modules == ["Plain"]
    adapter.enable_gradient_checkpointing()
    losses = train(adapter.train(), inputs)
    assert losses == sorted(losses, reverse=True)
    adapter.save_pretrained(tmp_path)
    loaded = NexusAdapter.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(*inputs()), adapter.eval()(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("last", [False, True])
def test_a_block_may_have_tensors_in_some_stages_only(
    tiny: Build, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: bool
) -> None:
    register_block("sparse")(Sparse)
    adapter = tiny(block="sparse", block_options={"last": last})
    adapter.save_pretrained(tmp_path / "folder")
    export_file(adapter, tmp_path / "one.safetensors")
    for loaded in (
        NexusAdapter.from_pretrained(tmp_path / "folder"),
        NexusAdapter.from_single_file(tmp_path / "one.safetensors"),
        import_adapter(tmp_path / "folder").adapter,
        load_adapter(tmp_path / "one.safetensors"),
    ):
        torch.testing.assert_close(loaded(*inputs()), adapter(*inputs()), rtol=0, atol=0)
    assert main(["info", str(tmp_path / "folder")]) == 0
    assert "sparse" in capsys.readouterr().out
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config |= {"channels": config["channels"][: 2 if last else 1], "pools": [0, 1][: 2 if last else 1]}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"in_channels": 1}))
    with refused("adapter"):
        load_adapter(tmp_path / "folder")


def test_an_unknown_block_is_named_and_nothing_is_imported(tiny: Build, tmp_path: Path) -> None:
    with BLOCKS.temporary():
        register_block("gained")(Gained)
        tiny(block="gained", block_options={"gain": 1.0}).save_pretrained(tmp_path)
    with refused("block", "'gained'", expected="paper", hint="--import MODULE"):
        NexusAdapter.from_pretrained(tmp_path)
    with refused("source", "block: expected a known block", hint='imports = ["MODULE"]'):
        import_adapter(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"block": "this.Zen"}))
    with refused("block", "'this.Zen'"):
        NexusAdapter.from_pretrained(tmp_path)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("options", "received"),
    [
        ({}, "{}"),
        ({"gian": 1.0}, "gian=1.0"),
        ({"gain": "1"}, "gain='1'"),
        ({"gain": True}, "gain=True"),
        ({"gain": None}, "gain=None"),
        ({"gain": 1, "widths": 3}, "widths=3"),
        ({"gain": 1, "widths": [3, "4"]}, "widths=[3, '4']"),
        ({"gain": 1, "kind": "max"}, "kind='max'"),
        ({"gain": 1, "names": ["a", 2]}, "names=['a', 2]"),
        ({"gain": 1, "text_width": 3}, "text_width=3"),
    ],
)
def test_options_are_checked_against_the_constructor(
    tiny: Build, options: dict[str, Any], received: str
) -> None:
    register_block("gained")(Gained)
    expected = "block 'gained': gain: float, widths: tuple[int, ...] = (1,)"
    with refused("block_options", received, expected=expected):
        tiny(block="gained", block_options=options)


def test_options_that_fit(tiny: Build) -> None:
    register_block("gained")(Gained)
    for more in ({"kind": "mean"}, {"names": None}, {"names": ["a"]}, {"widths": []}):
        tiny(block="gained", block_options={"gain": 1, **more})
    for options in ({"gain": torch.zeros(1)}, {"gain": float("nan")}):
        with refused("block_options", "gain", expected="JSON"):
            tiny(block="gained", block_options=options)
    with refused("block_options", "gain=1", expected="no options for block 'paper'"):
        tiny(block_options={"gain": 1})


def test_a_name_belongs_to_one_class() -> None:
    register_block("mine")(Plain)
    register_block("mine")(Plain)
    again = type(
        "Plain", (Plain,), {"__module__": Plain.__module__, "__qualname__": Plain.__qualname__}
    )  # as a notebook's cell that is run again
    assert register_block("mine")(again) is again
    assert find_block("mine") is again
    for name, taken in (("mine", "test_blocks.Plain"), ("paper", "nexus_adapters.adapter.stage.Stage")):
        with refused("name", taken):
            register_block(name)(Gained)
    with refused("name", "''"):
        register_block("")
    assert find_block("paper") is Stage


def test_what_is_no_block_is_refused() -> None:
    class Short(nn.Module):
        def __init__(self, in_channels: int, channels: int, pools: int) -> None:
            super().__init__()

    with refused("block", "lacks groups, text_width, heads, head_width, residual, zero_init"):
        register_block("short")(Short)
    with refused("block", "builtins.int", expected="torch.nn.Module"):
        register_block("int")(int)
    assert "short" not in BLOCKS


NUMBER = 3


def test_installed_packages_offer_blocks(install: Callable[..., None], tiny: Build) -> None:
    plain = f"{__name__}:Plain"
    gone = "no_such_module:Block"
    install(GROUP, theirs=plain, gone=gone, number=f"{__name__}:NUMBER", paper=plain)
    assert set(BLOCKS) >= {"paper", "theirs", "gone"}
    assert {type(stage) for stage in tiny(block="theirs").adapter.body} == {Plain}
    assert {type(stage) for stage in tiny().adapter.body} == {Stage}
    with refused("block", "no_such_module"):
        tiny(block="gone")
    with refused("block", "3"):
        tiny(block="number")


def test_two_packages_of_one_name_are_not_guessed_between(install: Callable[..., None], tiny: Build) -> None:
    for package in ("two", "one"):
        install(GROUP, theirs=f"{package}:Block")
    with refused("block", "one:Block, two:Block"):
        tiny(block="theirs")


@pytest.mark.parametrize("name", TRIALS)
def test_the_benchmarks_blocks_are_ordinary_ones(
    tiny: Build, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    sys.modules.pop("trial_blocks", None)
    import_module("trial_blocks")  # registers the same blocks again where another test did so before
    del sys.modules["trial_blocks"]  # so that whoever imports it next registers its blocks again
    adapter = tiny(block=name, residual=True)
    seconds = [tensor for tensor in adapter.state_dict() if "cross_attention2" in tensor]
    assert {tensor.split(".")[2] for tensor in seconds} == ({"2"} if name == "twice" else set())
    losses = train(adapter, inputs)
    assert losses == sorted(losses, reverse=True)
    adapter.save_pretrained(tmp_path)
    torch.testing.assert_close(
        NexusAdapter.from_pretrained(tmp_path)(*inputs()), adapter(*inputs()), rtol=0, atol=0
    )
    with refused("residual", "False"):
        tiny(block=name, residual=False)
