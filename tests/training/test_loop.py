import json
import os
import shutil
import signal
import threading
import time
import warnings
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from tests.refusals import refused
from torch import nn

from nexus_adapters.training.checkpoint import TrainState, latest_checkpoint
from nexus_adapters.training.config import CheckpointOptions, LogOptions, TrainingOptions
from nexus_adapters.training.loop import DivergedError, Stopped, step_generator, train
from nexus_adapters.training.optimizer import build_optimizer, learning_rate_at
from nexus_adapters.training.run_identity import HELD_OUT

STEPS = 12


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def losses_of(module, parts=1):
    """Fits y = the sum of x, on points drawn from the step alone."""

    def losses(step):
        x = torch.randn(8, 3, generator=step_generator(0, step))
        for part in x.chunk(parts):
            yield (module(part) - part.sum(1, keepdim=True)).square().mean()

    return losses


def options(**changes):
    given = {"max_train_steps": STEPS, "learning_rate": 0.05, "gradient_accumulation_steps": 1}
    return TrainingOptions(**given | {"schedule": "cosine", "warmup_steps": 2} | changes)


def trained(
    output_dir, module=None, losses=None, identity=None, observer=None, every=5, log=3, kept=None, **changes
):
    module = module or tiny()
    training = options(**changes)
    state = TrainState.of(module, build_optimizer(training, module), training.ema_decay)
    train(
        state,
        losses or losses_of(module, training.gradient_accumulation_steps),
        training,
        CheckpointOptions(every_steps=every, **kept or {}),
        LogOptions(every_steps=log),
        output_dir,
        "test",
        identity or {},
        Accelerator(cpu=True, mixed_precision="no"),
        observer=observer,
    )
    return state.result if training.ema_decay else module


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def rows(output_dir):
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def saved_step(output_dir):
    return latest_checkpoint(output_dir / "checkpoints").step


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A module that was trained without a stop."""
    return trained(tmp_path_factory.mktemp("reference"))


def test_trains(tmp_path):
    module = tiny()
    (before,) = losses_of(module)(999)
    trained(tmp_path, module, max_train_steps=200)
    (after,) = losses_of(module)(999)
    assert after.item() < 0.05 * before.item()


def test_takes_adamws_steps(tmp_path):
    """Against the optimizer by hand: schedule, clipping and weight decay."""
    ours, theirs = trained(tmp_path, max_grad_norm=0.5), tiny()
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        for loss in losses_of(theirs)(step):
            loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(options(), step)
        optimizer.step()
    assert same(ours, theirs)


def test_parts_are_one_step(tmp_path, reference):
    """Four parts of two samples give the gradient of one of eight, up to rounding."""
    parts = trained(tmp_path, gradient_accumulation_steps=4)
    for ours, theirs in zip(parts.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12]


def signalled(module, stop, number):
    """Losses during whose step `stop` a signal comes."""

    def losses(step):
        if step == stop:
            os.kill(os.getpid(), number)
        return losses_of(module)(step)

    return losses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "stop", [pytest.param(s, marks=[] if s in (0, 4, 10) else pytest.mark.full) for s in range(STEPS - 1)]
)
def test_stopped_by_a_signal_and_resumed_is_never_stopped(tmp_path, reference, stop, number):
    module = tiny()
    with pytest.raises(Stopped) as caught:
        trained(tmp_path, module, signalled(module, stop, number))
    assert caught.value.exit_status == 128 + number
    assert caught.value.step == saved_step(tmp_path) == stop + 1  # the step is finished, and saved
    assert same(trained(tmp_path), reference)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, reference):
    module = tiny()
    trained(tmp_path, module, signalled(module, STEPS - 1, signal.SIGTERM))
    assert same(module, reference)


def test_signals_act_as_before_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trained(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_acts_at_once(tmp_path, reference):
    module = tiny()

    def losses(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return losses_of(module)(step)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, module, losses)
    assert saved_step(tmp_path) == 5
    assert same(trained(tmp_path), reference)


def test_a_second_sigterm_changes_nothing(tmp_path, reference):
    """Schedulers send it to the launcher and to its processes, and the launcher sends it on."""
    module = tiny()

    def losses(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return losses_of(module)(step)

    with pytest.raises(Stopped):
        trained(tmp_path, module, losses)
    assert saved_step(tmp_path) == 8
    assert same(trained(tmp_path), reference)


def test_a_thread_can_train(tmp_path, reference):
    found = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert same(found[0], reference)


def stopped_at(step_to_stop, module, error=SystemExit):
    def losses(step):
        if step == step_to_stop:
            raise error
        return losses_of(module)(step)

    return losses


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"ema_decay": 0.9}, {"schedule": "linear"}])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_every_kind_of_run_resumes_exactly(tmp_path, stop, changes):
    never_stopped = trained(tmp_path / "never stopped", **changes)
    module = tiny()
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped", module, signalled(module, stop, signal.SIGTERM), **changes)
    assert same(trained(tmp_path / "stopped", **changes), never_stopped)


def test_the_average_follows_the_weights(tmp_path):
    """By hand: it starts at the weights after the first step."""
    module, seen = tiny(), []

    def losses(step):
        seen.append([parameter.detach().clone() for parameter in module.parameters()])
        return losses_of(module)(step)

    average = trained(tmp_path, module, losses, ema_decay=0.75)
    seen.append([parameter.detach().clone() for parameter in module.parameters()])
    expected = seen[1]
    for weights in seen[2:]:
        expected = [0.75 * e + 0.25 * w for e, w in zip(expected, weights, strict=True)]
    for ours, theirs in zip(average.parameters(), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert not same(average, module)


def test_killed_between_checkpoints_and_resumed_is_never_stopped(tmp_path, reference):
    module = tiny()
    with pytest.raises(SystemExit):
        trained(tmp_path, module, stopped_at(8, module))
    assert saved_step(tmp_path) == 5
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]
    assert same(trained(tmp_path), reference)
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12]  # none twice


def test_a_finished_run_does_nothing(tmp_path, reference):
    trained(tmp_path)
    before = files(tmp_path)

    def unwanted(step):
        raise AssertionError(f"step {step} of a finished run")

    module = trained(tmp_path, losses=unwanted)
    assert same(module, reference)  # but the weights are there
    assert files(tmp_path) == before


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, reference, monkeypatch):
    module = tiny()

    def full_disk(_):
        raise OSError("no space left on device")

    def losses(step):
        if step == 9:  # the save of the tenth step does not get through
            monkeypatch.setattr(os, "fsync", full_disk)
        return losses_of(module)(step)

    with pytest.raises(OSError, match="no space left"):
        trained(tmp_path, module, losses)
    monkeypatch.undo()
    assert saved_step(tmp_path) == 5
    assert same(trained(tmp_path), reference)


def test_what_is_frozen_stays(tmp_path):
    module = tiny()
    module[0].requires_grad_(False)
    before = tiny()
    trained(tmp_path, module)
    assert same(module[0], before[0])
    assert not same(module[2], before[2])


def poisoned(module, bad_steps):
    """Losses that are not finite in some steps."""

    def losses(step):
        for loss in losses_of(module)(step):
            yield loss * (float("nan") if step in bad_steps else 1.0)

    return losses


def test_a_step_that_is_not_finite_is_skipped_and_logged(tmp_path):
    module = tiny()
    trained(tmp_path, module, poisoned(module, {3, 4, 8}), max_bad_steps=3)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    assert [row["step"] for row in rows(tmp_path) if row.get("skipped")] == [4, 5, 9]
    assert {row["loss"] for row in rows(tmp_path) if row.get("skipped")} == {None}
    assert saved_step(tmp_path) == STEPS


def test_a_skipped_step_is_none(tmp_path):
    """Neither momentum nor decay: as if the optimizer had not been called."""
    one, other = tiny(), tiny()
    trained(tmp_path / "a", one, poisoned(one, {5}), schedule="constant", warmup_steps=0)
    without = lambda step: losses_of(other)(step if step < 5 else step + 1)  # noqa: E731
    trained(tmp_path / "b", other, without, schedule="constant", warmup_steps=0, max_train_steps=STEPS - 1)
    assert same(one, other)


def test_too_many_of_them_stop_the_run_with_a_diagnosis(tmp_path):
    module = tiny()
    with pytest.raises(
        DivergedError, match=r"^training: .*no finite gradient in 4 steps in a row, up to step 11, "
    ):
        trained(tmp_path, module, poisoned(module, set(range(7, 99))), max_bad_steps=4)
    kept = latest_checkpoint(tmp_path / "checkpoints")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.tensors("module").values())


def steps_saved(output_dir):
    return sorted(int(path.name[5:]) for path in (output_dir / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("every", "kept", "bad", "left", "healthy"),
    [
        (1, {"keep": 1}, range(7, 99), [6, 7], 6),  # of 7 it is not known whether a step can follow it
        (1, {"keep": 2}, range(7, 99), [5, 6, 7], 6),
        (2, {"keep": 1}, range(7, 99), [6], 6),
        (3, {"keep": 1, "keep_every": 3}, range(7, 99), [3, 6], 6),
        (4, {"keep": 1}, [*range(4, 7), *range(8, 99)], [4, 8], 4),
        (1, {"keep": 1}, range(1, 99), [1], None),
        (5, {"keep": 1}, range(99), [], None),
    ],
)
def test_a_divergence_leaves_the_last_healthy_checkpoint(tmp_path, every, kept, bad, left, healthy):
    module = tiny()
    with pytest.raises(DivergedError) as caught:
        trained(tmp_path, module, poisoned(module, {*bad}), every=every, kept=kept, max_bad_steps=4)
    assert steps_saved(tmp_path) == left
    folder = tmp_path / "checkpoints" / f"step-{healthy or 0:08d}"
    assert (str(folder) in str(caught.value)) == (healthy is not None)
    assert "learning_rate" in str(caught.value)
    if healthy:
        again = tiny()
        with pytest.raises(DivergedError, match=f"{folder.name}"):  # the same command says the same
            trained(tmp_path, again, poisoned(again, {*bad}), every=every, kept=kept, max_bad_steps=4)
        assert folder.is_dir()


def test_a_checkpoint_that_falls_into_bad_steps_comes_after_them(tmp_path):
    module = tiny()
    kept = {"keep": 3, "keep_every": 1}
    trained(tmp_path, module, poisoned(module, {3, 4, 5, 11}), every=5, kept=kept)
    assert steps_saved(tmp_path) == [1, 2, 3, 7, 8, 9, 10, 11]  # nor does the run end in one of them
    module = tiny()
    trained(tmp_path / "b", module, poisoned(module, {3, 4, 5}), every=5)
    assert steps_saved(tmp_path / "b") == [10, 12]
    module = tiny()
    trained(tmp_path / "c", module, poisoned(module, {3, 4, 5}), every=5, kept={"keep": 3})
    assert steps_saved(tmp_path / "c") == [7, 10, 12]


@pytest.mark.parametrize("stop", [1, 6])
def test_a_stop_in_a_bad_step_says_what_is_saved(tmp_path, stop):
    module, other = tiny(), tiny()

    def losses(step):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return poisoned(module, {1, 6})(step)

    with pytest.raises(Stopped, match="last saved step is 5" if stop == 6 else "no step has been saved"):
        trained(tmp_path, module, losses)
    assert steps_saved(tmp_path) == ([5] if stop == 6 else [])
    never = trained(tmp_path / "never", other, poisoned(other, {1, 6}))
    module = tiny()
    assert same(trained(tmp_path, module, poisoned(module, {1, 6})), never)


def test_weights_that_are_not_finite_are_a_divergence(tmp_path):
    module = tiny()

    def losses(step):
        if step == 6:
            module[0].weight.data[0, 0] = float("inf")
        return [loss * 0 for loss in losses_of(module)(0)] if step < 6 else [module[2].bias.sum()]

    with pytest.raises(DivergedError, match=r"module 0\.weight"):
        trained(tmp_path, module, losses, every=7, weight_decay=0.0)


LOST = {
    "all deleted": lambda folder: shutil.rmtree(folder),
    "emptied": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
    "all damaged": lambda folder: [os.truncate(p / "module.safetensors", 9) for p in folder.iterdir()],
    "of an old version": lambda folder: [
        (folder.parent / "progress.json").unlink(),
        *((path / "state.json").unlink() for path in folder.iterdir()),
    ],
}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
def test_a_run_that_lost_its_checkpoints_does_not_start_again(tmp_path, kind):
    trained(tmp_path)
    LOST[kind](tmp_path / "checkpoints")
    before = files(tmp_path)
    received = str(tmp_path) if kind == "of an old version" else f"{tmp_path}', which has"
    with refused("output_dir", received, hint="adapter.start_from") as caught:
        trained(tmp_path, losses=lambda step: 1 / 0, max_train_steps=20)
    assert ("at step 12" in caught.value.received) == (kind != "of an old version")
    assert files(tmp_path) == before


class KilledError(Exception):
    """Stands for a kill."""


def killed_at(step, module):
    def losses(now):
        if now == step:
            raise KilledError
        return losses_of(module)(now)

    return losses


def damaged(output_dir, *steps):
    for step in steps:
        os.truncate(output_dir / "checkpoints" / f"step-{step:08d}" / "module.safetensors", 40)


@pytest.mark.parametrize(
    ("keep", "saved", "damage", "first_left", "left"),
    [  # what a step after resuming leaves, and the next checkpoint
        (1, [5, 10], [10], [5, 10], [5, 6]),
        (2, [5, 10], [10], [5, 10], [5, 6]),
        (2, [4, 8, 10], [8, 10], [4, 8, 10], [4, 5]),
        (1, [4, 8, 10], [4], [10], [10, 11]),
        (2, [3, 6, 9], [6], [3, 6, 9], [3, 6, 9, 10]),
        (1, [3, 6, 9], [9], [6, 9], [6, 7]),
    ],
)
@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
def test_damaged_checkpoints_are_not_kept_for_healthy_ones(
    tmp_path, reference, keep, saved, damage, first_left, left
):
    def attempt(end, every, **kept):
        module = tiny()
        with pytest.raises(KilledError):
            trained(tmp_path, module, killed_at(end, module), every=every, kept=kept)

    for step in saved:
        attempt(step, step, keep=9)
    damaged(tmp_path, *damage)
    start = max({*saved} - {*damage})
    attempt(start + 1, 99, keep=keep)
    assert steps_saved(tmp_path) == first_left
    attempt(start + 1, start + 1, keep=keep)
    assert steps_saved(tmp_path) == left
    damaged(tmp_path, start + 1)  # of which it was not known whether a step can follow it
    assert same(trained(tmp_path, kept={"keep": keep}), reference)


@pytest.mark.parametrize(("damage", "healthy"), [([10], 5), ([8], 5), ([5, 10], None), ([5], 8)])
@pytest.mark.filterwarnings("ignore:checkpoint:UserWarning")
def test_no_damaged_checkpoint_is_called_healthy(tmp_path, damage, healthy):
    for step in (5, 8, 10):
        module = tiny()
        with pytest.raises(KilledError):
            trained(tmp_path, module, killed_at(step, module), every=step, kept={"keep": 9})
    damaged(tmp_path, *damage)
    module = tiny()
    with pytest.raises(DivergedError) as caught:
        trained(tmp_path, module, poisoned(module, {*range(99)}), kept={"keep": 9}, max_bad_steps=2)
    named = [step for step in (5, 8, 10) if f"step-{step:08d}" in str(caught.value)]
    assert named == [step for step in (healthy,) if step]


@pytest.mark.parametrize("left", [3, 6])
def test_going_back_to_an_older_checkpoint_is_reported(tmp_path, reference, left):
    trained(tmp_path, every=3, kept={"keep": 9})
    for step in steps_saved(tmp_path):
        if step > left:
            shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    with pytest.warns(UserWarning, match=f"checkpoint of step 12 .* resumes from step {left}$") as caught:
        assert same(trained(tmp_path, every=3), reference)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tmp_path, every=3)


def test_what_a_run_reads_is_in_its_checkpoints(tmp_path):
    now = {"seed": 1, "data": "of 12 samples", "encoders": "a", "denoiser": "b"}
    trained(tmp_path / "now", identity=now)
    trained(tmp_path / "now", identity=now, losses=lambda step: 1 / 0)
    for key, what in (("data", "different data"), ("encoders", "text encoder"), ("denoiser", "UNet")):
        with refused("output_dir", what, hint="adapter.start_from"):
            trained(tmp_path / "now", identity=now | {key: "else"})
    with refused("output_dir", "2", expected="seed = 1"):
        trained(tmp_path / "now", identity=now | {"seed": 2})
    trained(tmp_path / "before", identity={"seed": 1, "samples": "by their names"})
    with pytest.warns(UserWarning, match="cannot be compared"):
        trained(tmp_path / "before", identity=now, losses=lambda step: 1 / 0)
    for identity in (now, {"seed": 1, "samples": "by their names"}):
        out = tmp_path / f"held out {len(identity)}"
        trained(out, identity=identity)
        with warnings.catch_warnings(), refused("output_dir", "held-out samples"):
            warnings.simplefilter("ignore")  # that data are not compared
            trained(out, identity=now | {HELD_OUT: 4})
    with (
        pytest.warns(UserWarning, match="cannot be compared"),
        refused("output_dir", "2", expected="seed = 1"),
    ):
        trained(tmp_path / "before", identity=now | {"seed": 2})


def test_a_run_that_had_none_yet_starts_again(tmp_path, reference):
    module = tiny()
    with pytest.raises(SystemExit):
        trained(tmp_path, module, stopped_at(4, module))
    assert same(trained(tmp_path), reference)


def test_they_are_counted_across_a_stop(tmp_path):
    module, other, bad = tiny(), tiny(), set(range(7, 99))

    def losses(step):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return poisoned(module, bad)(step)

    with pytest.raises(Stopped):
        trained(tmp_path, module, losses, max_bad_steps=4)
    with pytest.raises(DivergedError, match=r" up to step 11,"):
        trained(tmp_path, other, poisoned(other, bad), max_bad_steps=4)


class Watcher:
    """Ends a run at a step; counts what it is asked."""

    def __init__(self, end=99):
        self.end, self.seen = end, []

    @property
    def is_over(self):
        return len(self.seen) >= self.end

    best_step = None

    def after_step(self, step):
        self.seen.append(step)
        return {"found": step / 2} if step % 4 == 0 else {}

    def state(self):
        return {"seen": self.seen}

    def restore(self, state):
        self.seen = state["seen"]


def test_an_observer_is_asked_after_each_step_and_logged(tmp_path):
    watcher = Watcher()
    trained(tmp_path, observer=watcher)
    assert watcher.seen == list(range(1, STEPS + 1))
    assert [row for row in rows(tmp_path) if "found" in row] == [
        {"step": step, "found": step / 2} for step in (4, 8, 12)
    ]


def test_a_run_that_an_observer_ends_says_so(tmp_path, capsys):
    trained(tmp_path / "whole", observer=Watcher())
    assert "stopped after" not in capsys.readouterr().err
    trained(tmp_path / "ended", observer=Watcher(7))
    assert f"stopped after 7 of {STEPS} steps" in capsys.readouterr().err


def test_an_observer_ends_a_run_and_resumes(tmp_path):
    module = tiny()
    with pytest.raises(Stopped):
        trained(tmp_path, module, signalled(module, 3, signal.SIGTERM), observer=Watcher(7))
    watcher = Watcher(7)
    trained(tmp_path, observer=watcher)
    assert watcher.seen == [1, 2, 3, 4, 5, 6, 7]
    assert saved_step(tmp_path) == 7
    trained(tmp_path, losses=lambda step: 1 / 0, observer=Watcher(7))  # it stays over


def test_log_rows(tmp_path):
    module = tiny()

    def losses(step):
        time.sleep(0.02)
        return losses_of(module)(step)

    trained(tmp_path, module, losses)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [3, 6, 9, 12]
    for row in logged:
        assert set(row) == {
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "step_s",
            "samples_per_s",
            "memory_gib",
        }
        assert row["learning_rate"] == learning_rate_at(options(), row["step"] - 1)
        assert row["grad_norm"] > 0
        assert row["step_s"] >= 0.02
        assert row["samples_per_s"] == pytest.approx(2 / row["step_s"], rel=0.01)  # both are rounded
        assert row["memory_gib"] > 0.05


def test_logged_loss_and_norm_are_of_the_step(tmp_path):
    module = tiny()
    (loss,) = losses_of(module)(0)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm().item()
    trained(tmp_path, max_train_steps=1, log=1, max_grad_norm=1e-3, warmup_steps=0)
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm)  # before clipping


@pytest.mark.parametrize("damage", ["\0\0\0\0\n", '{"step": 7, "lo\n', "[1]\n", "\n"])
def test_a_row_that_a_loss_of_power_has_damaged_is_dropped(tmp_path, damage):
    trained(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(damage + whole)
    trained(tmp_path)
    assert log.read_text() == whole


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    trained(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 12, "lo')
    trained(tmp_path)
    assert log.read_text() == whole


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
    ("identity", "expected", "received"),
    [
        ({"task": "b", "seed": 3}, "task = 'a'", "'b'"),
        ({"task": "a", "seed": 4}, "seed = 3", "4"),
        ({"task": "a"}, "seed = 3", "0"),  # what was left out has its default
    ],
)
def test_another_run_does_not_resume_from_this_ones_checkpoint(tmp_path, identity, expected, received):
    trained(tmp_path, identity={"task": "a", "seed": 3})
    before = files(tmp_path)
    with refused("output_dir", received, expected=expected):
        trained(tmp_path, identity=identity)
    assert files(tmp_path) == before


def test_at_a_constant_rate_a_run_may_be_made_longer(tmp_path):
    trained(tmp_path, schedule="constant", max_train_steps=4)
    longer = trained(tmp_path, schedule="constant", max_train_steps=9)
    at_once = trained(tmp_path / "at_once", schedule="constant", max_train_steps=9)
    assert same(longer, at_once)
