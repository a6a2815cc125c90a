import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.refusals import refused
from torch import nn

from nexus_adapters.training.checkpoint import (
    NotFinite,
    TrainState,
    damage,
    latest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)


def save(folder, step, keep=2, value=None):
    value = float(step) if value is None else value
    tensors = {"module": {"a": torch.full((3,), value), "b": torch.tensor(step)}, "average": {}}
    path = save_checkpoint(folder, step, tensors, {"seen": [1, {"x": 0.1}]})
    remove_old_checkpoints(folder, keep)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.state["seen"]) == (7, [1, {"x": 0.1}])
    assert torch.equal(found.tensors("module")["a"], torch.full((3,), 7.0))
    assert found.tensors("module")["b"].item() == 7
    assert found.tensors("average") == {}


def test_no_folder_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None


def test_only_safetensors_and_json_are_written(tmp_path):
    path = save(tmp_path, 1)
    assert names(path) == ["manifest.json", "module.safetensors", "state.json"]
    assert set(json.loads((path / "manifest.json").read_text())["sha256"]) == {
        "module.safetensors",
        "state.json",
    }


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 1000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    assert latest_checkpoint(tmp_path).step == 1000


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "left"),
    [
        (1, 0, None, [70]),
        (2, 0, 20, [20, 60, 70]),
        (1, 30, None, [30, 60, 70]),
        (2, 20, 10, [10, 20, 40, 60, 70]),
        (9, 0, 70, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_milestones_and_the_best_stay(tmp_path, keep, keep_every, best, left):
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=9)
    remove_old_checkpoints(tmp_path, keep, keep_every, best)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


DAMAGE = {
    "a flipped bit": lambda p: flip(p / "module.safetensors"),
    "a shortened file": lambda p: os.truncate(p / "module.safetensors", 40),
    "an empty file": lambda p: os.truncate(p / "state.json", 0),
    "a missing file": lambda p: (p / "state.json").unlink(),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "half a manifest": lambda p: os.truncate(p / "manifest.json", 30),
    "another kind of manifest": lambda p: (p / "manifest.json").write_text("[]"),
    "a manifest of nothing": lambda p: (p / "manifest.json").write_text('{"sha256": {}}'),
    "an empty folder": lambda p: [file.unlink() for file in p.iterdir()],
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_with_a_word(tmp_path, kind):
    save(tmp_path, 1)
    DAMAGE[kind](save(tmp_path, 2))
    with pytest.warns(UserWarning, match=r"^checkpoint: '.*step-00000002' is skipped because"):
        assert latest_checkpoint(tmp_path).step == 1


def test_a_damaged_one_is_replaced_by_the_same_step(tmp_path):
    path = save(tmp_path, 2)
    DAMAGE["no manifest"](path)
    save(tmp_path, 2)
    assert damage(path) is None
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("keep", [1, 2])
def test_one_that_comes_after_damaged_newer_ones_stays(tmp_path, keep):
    for step in (1, 5, 6):
        DAMAGE["no manifest"](save(tmp_path, step, keep=3))
    save(tmp_path, 2, keep=keep)
    assert latest_checkpoint(tmp_path).step == 2
    assert not {"step-00000005", "step-00000006"} & set(names(tmp_path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_written_of_what_is_not_finite(tmp_path, bad):
    save(tmp_path, 1)
    with pytest.raises(NotFinite, match="module a"):
        save(tmp_path, 2, value=bad)
    assert names(tmp_path) == ["step-00000001"]


def calls_of(monkeypatch, tmp_path):
    """Counts each write, sync and rename of a save, and lets the `fail_at`th fail."""
    state = {"count": 0, "fail_at": -1}

    def failing(real):
        def call(*args, **kwargs):
            state["count"] += 1
            if state["count"] - 1 == state["fail_at"]:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr("safetensors.torch.save_file", failing(save_file))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    return state


def test_whatever_fails_in_a_save_the_checkpoint_before_is_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        state = calls_of(patch, tmp_path)
        save(tmp_path / "count", 1)
        save(tmp_path / "count", 2, keep=1)
        total = state["count"]
    assert total > 15
    for fail_at in range(total):
        folder = tmp_path / str(fail_at)
        with monkeypatch.context() as patch:
            save(folder, 1)
            state = calls_of(patch, tmp_path)
            state["fail_at"] = fail_at
            try:
                save(folder, 2, keep=1)
            except OSError:
                pass
            else:
                break  # past the last call of a save
        found = latest_checkpoint(folder)
        assert found.step in (1, 2)
        assert torch.equal(found.tensors("module")["a"], torch.full((3,), float(found.step)))
        assert save(folder, 3)
        assert latest_checkpoint(folder).step == 3
        assert not [name for name in names(folder) if name.startswith(".")]  # nor is anything left over
    assert fail_at > 7


def test_a_save_that_was_killed_leaves_nothing_that_counts(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".unfinished-step-00000002-ab")
    assert latest_checkpoint(tmp_path).step == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_newer_formats_checkpoint_is_refused(tmp_path):
    """And not skipped: a run that went back to an older one would overwrite it."""
    save_checkpoint(tmp_path, 1, {"module": {"w": torch.ones(1)}}, {"format_version": 2})
    assert latest_checkpoint(tmp_path).step == 1
    newer = save_checkpoint(tmp_path, 2, {"module": {"w": torch.ones(1)}}, {"format_version": 3})
    with refused("output_dir", f"'{newer}' with format_version 3", hint="Upgrade"):
        latest_checkpoint(tmp_path)


class Wrapping(torch.optim.SGD):
    """Keeps tensors and numbers, a part of them in a mapping of their own, as bitsandbytes does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = state.get("mean", torch.zeros(2)) + 1
                state["codes"] = torch.full((3,), state["step"], dtype=torch.uint8)

    def state_dict(self):
        whole = super().state_dict()
        wrapped = {
            index: {"step": state["step"], "__quantized__": {"codes": state["codes"], "mean": state["mean"]}}
            for index, state in whole["state"].items()
        }
        return whole | {"state": wrapped}


def test_an_optimizers_state_comes_back_whatever_it_holds(tmp_path):
    module = nn.Linear(2, 2)
    optimizer = Wrapping(module.parameters(), lr=0.1)
    state = TrainState.of(module, optimizer, ema_decay=0.5)
    for _ in range(3):
        optimizer.step()
    save_checkpoint(tmp_path, 3, state.tensors(), {"train": state.scalars()})
    fresh = Wrapping(nn.Linear(2, 2).parameters(), lr=0.1)
    other = TrainState.of(nn.Linear(2, 2), fresh, ema_decay=0.5)
    checkpoint = latest_checkpoint(tmp_path)
    other.restore(checkpoint, checkpoint.state["train"])
    for ours, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["step"] == 3
        assert torch.equal(ours["mean"], theirs["mean"])
        assert torch.equal(ours["codes"], theirs["codes"])
