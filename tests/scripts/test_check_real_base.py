"""The checks of a real base, on a tiny one."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.methods.built import build


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        yield import_module("check_real_base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "base"
    tiny.sd15().save_pretrained(folder)
    return folder


def lines(script, capsys, *arguments):
    status = script.main([*map(str, arguments), "--quick", "--device", "cpu"])
    return status, capsys.readouterr().out.splitlines()


def test_every_check_passes_on_a_good_base(script, base, tmp_path, capsys):
    torch.manual_seed(1)
    t2i = build("t2i")
    for parameter in t2i.parameters():
        parameter.data.mul_(3)  # enough to be seen
    t2i.save_pretrained(tmp_path / "t2i")
    status, found = lines(script, capsys, "--base", base, "--t2i", tmp_path / "t2i")
    assert [line[:4] for line in found] == ["pass"] * 6, found
    assert status == 0
    assert "every value is the same" in found[4]
    assert "5,000 steps take about" in found[5]


@pytest.mark.parametrize("what", ["counts", "features", "strength"])
def test_what_is_wrong_fails(script, base, tmp_path, capsys, monkeypatch, what):
    at = {"counts": 1, "features": 2, "strength": 4}[what]
    if what == "counts":
        widths = tuple(tiny.SD15_UNET["block_out_channels"])
        monkeypatch.setattr(script, "COUNTS", {(widths, tiny.TEXT_WIDTH): (1, 2)})
    elif what == "features":
        prime = script.import_adapter

        def worse(*args, **options):
            found = prime(*args, **options)
            found.adapter.adapter.conv_in.weight.data.mul_(1.01)
            return found

        monkeypatch.setattr(script, "import_adapter", worse)
    else:
        control = script.Control
        monkeypatch.setattr(script, "Control", lambda *args, **_: control(*args))
    monkeypatch.setattr(script.Checks, "trains", lambda self: "")
    status, found = lines(script, capsys, "--base", base)
    assert found[at].startswith("FAIL")
    assert status == 1


def test_a_base_that_does_not_load_ends_it(script, tmp_path, capsys):
    status, found = lines(script, capsys, "--base", tmp_path / "nowhere")
    assert status == 1
    assert [line[:4] for line in found] == ["FAIL"]
