import json
import math
from itertools import product

import pytest
import torch
from torch import nn

from nexus_adapters.training import loop
from nexus_adapters.training.loop import LoopOptions, step_generator, train

STEPS = 12


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(module):
    """Fits y = the sum of x, on points drawn from the step alone."""

    def loss_of_step(step):
        x = torch.randn(8, 3, generator=step_generator(0, step))
        return (module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss_of_step


def options(**changes):
    given = {
        "max_train_steps": STEPS,
        "learning_rate": 0.05,
        "checkpoint_every_steps": 5,
        "log_every_steps": 3,
    }
    return LoopOptions(**given | {"schedule": "cosine", "warmup_steps": 2} | changes)


def trained(output_dir, module=None, loss=None, identity=None, **changes):
    module = module or tiny()
    train(module, loss or loss_of(module), options(**changes), output_dir, "test", identity or {})
    return module


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def saved_step(output_dir):
    return torch.load(output_dir / "checkpoint.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A module that was trained without a stop."""
    return trained(tmp_path_factory.mktemp("reference"))


def test_trains(tmp_path):
    module = tiny()
    before = loss_of(module)(999).item()
    trained(tmp_path, module, max_train_steps=200)
    assert loss_of(module)(999).item() < 0.05 * before


def test_takes_adamws_steps(tmp_path):
    """Against the optimizer by hand: schedule, clipping and weight decay."""
    ours, theirs = trained(tmp_path, max_grad_norm=0.5), tiny()
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(theirs)(step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = options().learning_rate_at(step)
        optimizer.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("stop", range(STEPS))
def test_stopped_in_a_loss_and_continued_is_never_stopped(tmp_path, reference, stop):
    module = tiny()

    def interrupted(step):
        if step == stop:
            raise KeyboardInterrupt
        return loss_of(module)(step)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, module, interrupted)
    assert saved_step(tmp_path) == stop  # no step is lost
    assert same(trained(tmp_path), reference)


@pytest.mark.parametrize("stop", [1, 5, 9, STEPS])
def test_stopped_in_an_update_and_continued_is_never_stopped(tmp_path, reference, monkeypatch, stop):
    """Half an update must not be saved: the run goes on from the checkpoint before."""
    update, module, taken = torch.optim.AdamW.step, tiny(), []

    def interrupted(self, *args, **kwargs):
        update(self, *args, **kwargs)
        taken.append(1)
        if len(taken) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, module)
    assert (tmp_path / "checkpoint.pt").exists() == (stop > 5)
    assert same(trained(tmp_path), reference)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_muon_stopped_and_continued_is_never_stopped(tmp_path, stop):
    def interrupted(step):
        if step == stop:
            raise KeyboardInterrupt
        return loss_of(module)(step)

    module = tiny()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", module, interrupted, optimizer="muon")
    never_stopped = trained(tmp_path / "never stopped", optimizer="muon")
    assert same(trained(tmp_path / "stopped", optimizer="muon"), never_stopped)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stop", [5, 10, STEPS])
def test_stopped_at_a_checkpoint_and_continued_is_never_stopped(
    tmp_path, reference, monkeypatch, stop, error
):
    save = loop._save

    def interrupted(output_dir, module, optimizer, step, run):
        save(output_dir, module, optimizer, step, run)
        if step == stop:
            monkeypatch.setattr(loop, "_save", save)
            raise error

    monkeypatch.setattr(loop, "_save", interrupted)
    with pytest.raises(error):
        trained(tmp_path)
    assert saved_step(tmp_path) == stop
    assert same(trained(tmp_path), reference)


def test_killed_between_checkpoints_and_continued_is_never_stopped(tmp_path, reference):
    module = tiny()

    def killed(step):
        if step == 8:
            raise SystemExit  # nothing is saved
        return loss_of(module)(step)

    with pytest.raises(SystemExit):
        trained(tmp_path, module, killed)
    assert saved_step(tmp_path) == 5
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]
    assert same(trained(tmp_path), reference)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12]  # none twice


def test_a_finished_run_does_nothing(tmp_path, reference):
    trained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def unwanted(step):
        raise AssertionError(f"step {step} of a finished run")

    module = trained(tmp_path, loss=unwanted)
    assert same(module, reference)  # but the weights are there
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"checkpoint.pt", "log.jsonl"}


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, reference, monkeypatch):
    write = torch.save

    def full_disk(state, path):
        if state["step"] == 10:
            path.write_bytes(b"half a")
            raise OSError("no space left on device")
        write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            trained(tmp_path)
    assert saved_step(tmp_path) == 5
    assert same(trained(tmp_path), reference)


def test_what_is_frozen_stays(tmp_path):
    module = tiny()
    module[0].requires_grad_(False)
    before = tiny()
    trained(tmp_path, module)
    assert same(module[0], before[0])
    assert not same(module[2], before[2])


def test_log_rows(tmp_path):
    trained(tmp_path)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [3, 6, 9, 12]
    for row in logged:
        assert set(row) == {"step", "loss", "grad_norm", "learning_rate", "step_s"}
        assert row["learning_rate"] == options().learning_rate_at(row["step"] - 1)
        assert row["grad_norm"] > 0
        assert row["step_s"] >= 0


def test_logged_loss_and_norm_are_of_the_step(tmp_path):
    module = tiny()
    loss = loss_of(module)(0)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm().item()
    trained(tmp_path, max_train_steps=1, log_every_steps=1, max_grad_norm=1e-3)
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(loss.item())
    assert row["grad_norm"] == pytest.approx(norm)  # before clipping


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    trained(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 12, "lo')
    trained(tmp_path)
    assert log.read_text() == whole


def test_constant_learning_rate_after_the_warm_up():
    rates = [options(schedule="constant", warmup_steps=3).learning_rate_at(step) for step in range(6)]
    assert rates == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 * 3 / 4, 0.05, 0.05, 0.05])


def test_cosine_learning_rate():
    rate = options(schedule="cosine", max_train_steps=110, warmup_steps=10).learning_rate_at
    assert [rate(0), rate(4), rate(10)] == pytest.approx([0.05 / 11, 0.05 * 5 / 11, 0.05])
    assert rate(60) == pytest.approx(0.025)
    assert rate(85) == pytest.approx(0.025 * (1 - math.sqrt(0.5)))
    assert 0 < rate(109) < 0.001 * 0.05
    assert rate(110) == rate(500) == 0


def test_no_warm_up_starts_at_the_peak():
    for schedule in ("constant", "cosine"):
        assert options(schedule=schedule, warmup_steps=0).learning_rate_at(0) == 0.05


def draws(*key):
    return torch.randn(1000, generator=step_generator(*key))


def test_a_steps_draws_repeat_exactly():
    torch.manual_seed(0)
    first = draws(3, 7)
    torch.manual_seed(1)
    assert torch.equal(draws(3, 7), first)


def test_steps_and_seeds_draw_independently():
    keys = list(product((0, 1, 2, 3), (0, 1, 2, 1000)))
    drawn = torch.stack([draws(*key) for key in keys])
    correlations = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert correlations.abs().max() < 0.15  # 4.7 standard deviations


def test_a_steps_draws_never_change():
    """A run continues under another version with the steps it would have taken."""
    assert torch.randint(1_000_000, (3,), generator=step_generator(1, 2)).tolist() == [
        941355,
        284221,
        411237,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": {"base": "b", "seed": 0}}, r"identity: expected base a.*received b"),
        ({"identity": {"base": "a"}}, r"identity: expected seed 0.*received None"),
        ({"learning_rate": 0.1}, r"options: expected learning_rate 0.05.*received 0.1"),
        ({"max_train_steps": STEPS + 1}, r"options: expected max_train_steps"),
    ],
)
def test_another_run_does_not_go_on_with_this_ones_checkpoint(tmp_path, changes, message):
    same_run = {"identity": {"base": "a", "seed": 0}}
    trained(tmp_path, **same_run)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **same_run | changes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    trained(tmp_path, **same_run, log_every_steps=1, checkpoint_every_steps=1)


def test_at_a_constant_rate_a_run_may_be_made_longer(tmp_path):
    trained(tmp_path, schedule="constant", max_train_steps=4)
    longer = trained(tmp_path, schedule="constant", max_train_steps=9)
    at_once = trained(tmp_path / "at_once", schedule="constant", max_train_steps=9)
    assert same(longer, at_once)
