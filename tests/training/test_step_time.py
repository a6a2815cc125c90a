"""How long a run takes: by its log, or by a step that is timed with random weights."""

import json
import re
import types

import psutil
import pytest
import torch
from tests import tiny
from tests.methods.built import build
from tests.training.runs import SMALL_UNET, config

from nexus_adapters.training import step_time
from nexus_adapters.training.checks import check_base
from nexus_adapters.training.run import dry_run
from nexus_adapters.training.step_time import describe_time, measure_step


@pytest.fixture
def second_by_second(monkeypatch):
    """A clock by which whatever is timed takes a second."""
    ticks = iter(range(1000))
    monkeypatch.setattr(step_time, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def time_line(report):
    (line,) = [line for line in report.splitlines() if line.startswith("time ")]
    return line


def described(root, out, measure=True, **changes):
    made = config(root, out, **changes)
    base, options, _ = check_base(made)
    return describe_time(made, base, options, measure)


@pytest.mark.parametrize("method", ["prime", pytest.param("controlnet", marks=pytest.mark.full)])
def test_a_dry_run_measures_a_step_on_request(root, tmp_path, method):
    changes = {"adapter__method": method, "training__max_train_steps": 50}
    if method == "controlnet":
        changes["base__path"] = str(root / "sd15")
    made = config(root, tmp_path / "out", **changes)
    found = re.search(
        r"about (\d+) seconds on this CPU \((\S+) s per step", time_line(dry_run(made, measure=True))
    )
    assert float(found[1]) == pytest.approx(50 * float(found[2]), abs=0.5 + 50 * 0.1 * float(found[2]))
    assert "--measure" in time_line(dry_run(made))
    assert not (tmp_path / "out").exists()


def test_a_step_is_all_its_batches_and_one_update(root, tmp_path, second_by_second):
    made = config(root, tmp_path / "out", training__batch_size=4, training__gradient_accumulation_steps=3)
    unet = tiny.unet(**SMALL_UNET).requires_grad_(False)
    adapter = build("prime", unet)
    before = adapter.adapter.conv_in.weight.clone()
    for count, expected in ((4, 3 + 1), (1, 12 + 1)):
        found = measure_step(made, tiny.base(unet), unet, adapter, made.adapter, count)
        assert found == step_time.StepTime(expected, None)
    assert not torch.equal(adapter.adapter.conv_in.weight, before)  # the whole step ran
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize(("checkpointed", "passes"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_repeats_the_forward_pass(
    root, tmp_path, second_by_second, checkpointed, passes
):
    made = config(root, tmp_path / "out", training__gradient_checkpointing=checkpointed)
    unet = tiny.unet(**SMALL_UNET).requires_grad_(False)
    seen = []
    unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: seen.append(1))
    measure_step(made, tiny.base(unet), unet, build("prime", unet), made.adapter, 2)
    assert len(seen) == (1 + 3) * passes


def test_on_a_gpu_the_report_has_the_measured_peak(root, tmp_path, monkeypatch):
    found = step_time.StepTime(2.0, 3 * 2**29)
    monkeypatch.setattr(step_time, "_measure_random", lambda *_: found)
    made = config(root, tmp_path / "out")
    report = dry_run(made, measure=True).splitlines()
    assert "measured     1.50 GiB at the peak of a step" in report
    assert report[report.index("measured     1.50 GiB at the peak of a step") - 1].startswith("memory ")
    monkeypatch.setattr(step_time, "_measure_random", lambda *_: step_time.StepTime(2.0, None))
    assert not any(line.startswith("measured ") for line in dry_run(made, measure=True).splitlines())


def test_a_cpu_times_the_whole_batch_where_that_is_short(root, tmp_path, second_by_second):
    """One by one, samples of a small base take longer."""
    changes = {"training__batch_size": 8, "training__max_train_steps": 3600}
    assert "about 2.0 hours" in described(root, tmp_path / "out", **changes)  # and not 9 s a step
    assert "about 33.0 hours" in described(root, tmp_path / "out", **changes | {"training__batch_size": 32})


def test_a_run_with_a_log_is_described_by_it(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    rows = [{"step": step, "loss": 0.1, "step_s": 600.0 if step == 1 else 2.5} for step in range(1, 61)]
    rows += [{"step": 60, "val_loss": 0.1}]
    (out / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for measure in (True, False):
        line = described(root, out, measure, training__max_train_steps=10_060)
        assert "about 6.9 hours for the remaining 10,000 steps (2.5 s per step" in line


def test_what_does_not_fit_in_memory_is_not_measured(root, tmp_path, monkeypatch):
    free = types.SimpleNamespace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    line = described(root, tmp_path / "out")
    assert "not measured: a step needs about 0.0 GiB, and 0.0 GiB are free" in line


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(60, "60 seconds"), (600, "10 minutes"), (36_000, "10.0 hours"), (864_000, "10.0 days")],
)
def test_a_duration_is_in_a_unit_of_its_size(root, tmp_path, steps, expected):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "step_s": 1.0}')
    assert f"about {expected} for" in described(root, out, training__max_train_steps=steps + 1)
