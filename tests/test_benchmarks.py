"""The timing benchmarks run, in miniature. What they measure is not tested: tests are not timed."""

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name, as if it had been started from its folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield import_module
    torch.set_num_threads(threads)


def run(module, out, *options):
    module.main(["--quick", "--out", str(out), *options])
    (written,) = out.glob("*.json")
    result = json.loads(written.read_text())
    assert set(result) == {"settings", "measured", "machine", "versions"}
    assert result["machine"]["torch_threads"] == torch.get_num_threads()
    assert result["machine"]["cpu"]
    assert result["versions"]["torch"] == version("torch")
    return written.stem, result["measured"]


def test_adapter_forward(benchmark, tmp_path):
    name, measured = run(benchmark("adapter_forward"), tmp_path, "--threads", "1", "--skip-memory")
    assert name == "adapter_forward"
    assert set(measured) == {"t2i", "prime", "slim"}
    for found in measured.values():
        assert found["forward_ms"]["low"] <= found["forward_ms"]["median"] <= found["forward_ms"]["high"]
        assert found["time_ratio_to_t2i"]["median"] > 0
    assert measured["t2i"]["time_ratio_to_t2i"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert measured["prime"]["parameters"] > measured["slim"]["parameters"] > 0


def test_peak_memory_is_that_of_a_process_of_its_own(benchmark):
    assert 50 < benchmark("adapter_forward").peak_memory_mib("prime", threads=1, quick=True) < 4000


def test_adapter_forward_measures_the_real_sizes(benchmark):
    module = benchmark("adapter_forward")
    with torch.device("meta"):
        counts = {
            m: sum(p.numel() for p in module.build(m, module.SD15).parameters()) for m in module.METHODS
        }
    assert counts == {"t2i": 77_369_280, "prime": 85_817_600, "slim": 59_288_960}


def test_hook(benchmark, tmp_path):
    name, measured = run(benchmark("hook"), tmp_path, "--threads", "1", "--steps", "3")
    assert name == "hook"
    assert set(measured) == {"step_alone_ms", "positive", "per_branch"}
    for policy in ("positive", "per_branch"):
        found = measured[policy]
        assert 0 < found["hook_ms"]["median"] < found["step_ms"]["median"]
        # The first step also runs the adapter.
        assert found["hook_with_adapter_in_first_step_ms"]["median"] > found["hook_ms"]["median"]


def test_hook_measures_sd15s_unet(benchmark):
    with torch.device("meta"):
        unet = benchmark("hook").build_pipeline(benchmark("hook").SD15_UNET).unet
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_scenes(benchmark, tmp_path):
    name, measured = run(benchmark("scenes"), tmp_path)
    assert name == "scenes"
    assert {"draw", "render", "canny", "caption", "score"} < set(measured)
    assert measured["draw_render_canny_scenes_per_s"] > 0


def test_quick_runs_leave_the_results_alone(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark("machine"), "RESULTS", tmp_path)
    benchmark("scenes").main(["--quick"])
    assert '"settings"' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
