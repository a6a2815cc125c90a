import subprocess
import sys
import types

import numpy as np
import pytest
from tests.refusals import refused

from nexus_adapters.evaluation.estimates import Measured, best_beyond_doubt
from nexus_adapters.evaluation.report import head
from nexus_adapters.metrics import METRICS, Metric, find_metric, register_metric

LABELS = {
    "frechet": "Fréchet",
    "mmd": "MMD",
    "clip_score": "CLIP score",
    "binding_color": "binding color",
    "binding_material": "binding material",
    "background": "background",
    "edge_f1": "edge F1",
    "ms_ssim": "MS-SSIM",
    "sketch_ms_ssim": "sketch MS-SSIM",
    "depth_rmse": "depth RMSE",
    "depth_rank_correlation": "depth rank corr.",
    "mean_iou": "mIoU",
    "normal_angle": "normal angle (degrees)",
}


@pytest.fixture(autouse=True)
def as_before():
    """What a test registers is forgotten again."""
    with METRICS.temporary():
        yield


def test_the_packages_metrics_keep_their_order_and_labels():
    """As in the tables and files of earlier results."""
    assert {name: metric.label for name, metric in METRICS.items()} == LABELS
    assert list(METRICS) == list(LABELS)
    lower = {name for name, metric in METRICS.items() if metric.better == "lower"}
    assert lower == {"frechet", "mmd", "depth_rmse", "normal_angle"}
    shorts = {metric.short for metric in METRICS.values() if metric.is_merit}
    assert shorts == {"colors", "edges", "depth", "mIoU", "sketch"}


def test_a_metric_is_one_record():
    metric = register_metric(Metric("warm_tones", better="lower", function=lambda generated: 0.5))
    assert METRICS["warm_tones"] is metric is find_metric("warm_tones")
    assert (metric.label, metric.short) == ("warm tones", "warm tones")
    assert list(METRICS)[-1] == "warm_tones"


def test_what_is_not_registered_is_shown_under_its_name_and_wins_nothing():
    assert find_metric("of_others") == Metric("of_others", "of others", "unknown")
    assert head("of_others") == "of others"
    assert (head("edge_f1"), head("mmd")) == ("edge F1 ↑", "MMD ↓")
    measured = {name: Measured({"of_others": np.full(30, value)}) for name, value in (("a", 0.0), ("b", 1.0))}
    assert best_beyond_doubt(measured, "of_others") is None


def defined(factor):
    def function(generated):
        return factor

    return Metric("defined", function=function)


def test_a_cell_of_a_notebook_can_run_again_but_no_other_metric_takes_its_name():
    register_metric(defined(1.0))
    register_metric(again := defined(2.0))
    assert METRICS["defined"] is again
    register_metric(again)
    for other in (Metric("defined"), Metric("defined", function=lambda generated: 0.0)):
        with refused("metric", received="'defined'"):
            register_metric(other)
    with refused("metric", received="'edge_f1'"):
        register_metric(Metric("edge_f1", function=lambda generated: 0.0))
    assert register_metric(METRICS["edge_f1"]) is METRICS["edge_f1"]


@pytest.mark.parametrize(
    ("metric", "received"),
    [
        (Metric("two words"), "'two words'"),
        (Metric("a@view"), "'a@view'"),
        (Metric("features"), "'features'"),
        (Metric("both", function=lambda _: 0.0, distance=lambda *_: 0.0), "'both'"),
        (Metric("merit", better="lower", is_merit=True), "'merit'"),
    ],
)
def test_records_that_make_no_sense_are_refused(metric, received):
    with refused("metric", received=received):
        register_metric(metric)


def test_registering_needs_no_torch():
    code = "import sys, nexus_adapters.metrics as m; m.METRICS['mmd']; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_installed_packages_add_metrics_by_entry_points(install, monkeypatch):
    module = types.ModuleType("their_package")
    module.THEIRS, module.WRONG = Metric("theirs", better="lower"), 3
    monkeypatch.setitem(sys.modules, "their_package", module)
    install("nexus_adapters.metrics", theirs="their_package:THEIRS")
    assert list(METRICS)[-1] == "theirs"
    assert find_metric("theirs").better == "lower"
    install("nexus_adapters.metrics", wrong="their_package:WRONG")
    with refused("metric", received="3", expected="'wrong'"):
        find_metric("wrong")
