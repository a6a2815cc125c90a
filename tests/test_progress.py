import itertools

import pytest
import tqdm.std
from diffusers import DiffusionPipeline

from nexus_adapters.progress import EVERY_S, bar_options, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std.tqdm, "monitor_interval", 0)
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr("nexus_adapters.progress.sys.stderr.isatty", lambda: False, raising=False)
    return now


def work(clock, seconds, capsys, **options):
    """A part of work for each number, which is how many seconds it takes; the lines that were logged."""
    with progress(what="encoding", unit="sample", total=len(seconds), **options) as bar:
        for each in seconds:
            clock[0] += each
            bar.update()
    return capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_every_30_seconds(clock, capsys):
    lines = work(clock, [1.0] * 100, capsys).splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "encoding: sample 30 of 100", "encoding: sample 60 of 100", "encoding: sample 90 of 100",
        "encoding: sample 100 of 100",
    ]  # fmt: skip
    assert "00:30 elapsed" in lines[0]
    assert "01:10 left" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        ([EVERY_S / 1000] * 900, 0),  # less than 30 s: nothing, not even that it is done
        ([0.01] * 10 + [100] * 3, 3),  # steps that take longer have a line each
        ([29, 2, 29, 2], 2),
        ([], 0),
    ],
)
def test_lines_are_as_many_as_half_minutes_and_steps_allow(clock, capsys, seconds, lines):
    text = work(clock, seconds, capsys)
    assert text.count("\n") == lines
    assert "\r" not in text
    assert "" not in text.splitlines()


def test_a_postfix_and_a_new_name_wait_for_the_next_line(clock, capsys):
    with progress(what="training", unit="step", total=100) as bar:
        for step in range(40):
            clock[0] += 1
            bar.set_postfix({"loss": step}, refresh=False)
            bar.set_description_str(f"training {step // 20}", refresh=False)
            bar.update()
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("training 1: step 30 of 100, ")
    assert first.endswith("loss=29")


def test_what_is_not_shown_logs_nothing(clock, capsys):
    assert work(clock, [100.0] * 3, capsys, shown=False) == ""


def test_items_come_through(clock, capsys):
    def slowly():
        for item in "abc":
            clock[0] += 40
            yield item

    assert list(progress(slowly(), what="reading", unit="shard", total=3)) == ["a", "b", "c"]
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("nexus_adapters.progress.sys.stderr.isatty", lambda: True, raising=False)
    assert bar_options() == {}
    list(progress(range(3), what="encoding", unit="sample"))
    text = capsys.readouterr().err
    assert text.startswith("\rencoding:")
    assert "3/3" in text


def test_a_pipelines_bar_becomes_lines_too(clock, capsys):
    pipe = DiffusionPipeline()
    pipe.set_progress_bar_config(desc="generating a.png", unit="step", **bar_options())
    with pipe.progress_bar(total=4) as bar:
        for _ in itertools.repeat(None, 4):
            clock[0] += 20
            bar.update()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "generating a.png: step 2 of 4", "generating a.png: step 4 of 4",
    ]  # fmt: skip
