"""On a local Ray of several workers: the set is the one that the local engine makes."""

import os
import signal
import sys
from functools import partial

import pytest
from tests.prepare.sets import digests, make
from tests.refusals import refused

from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import MISSING
from nexus_adapters.prepare.engines import run_ray, sigterm_kept
from nexus_adapters.prepare.filters import Filters
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.run import prepare

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests: it takes seconds to start."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with sigterm_kept():
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


class DyingSource(SceneSource):
    """Once kills the process that asks for sample 13, and notes who asked for others."""

    def __init__(self, count, notes):
        super().__init__(count)
        self.notes = notes

    def load(self, index):
        (self.notes / f"asked-by-{os.getpid()}").touch()
        try:
            if index == 13:
                (self.notes / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
        return super().load(index)


def plan(source, **changes):
    return Plan(source, {"canny": {}, "sketch": {}}, shard_size=5, **changes)


@pytest.mark.full
def test_a_worker_that_is_killed_costs_nothing_but_time(cluster, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    counted = []

    def engine(plan, folder, step, shards, progress):
        run_ray(plan, folder, step, shards, lambda count: (counted.append(count), progress(count)), workers=2)

    result = prepare(plan(DyingSource(40, notes)), tmp_path / "ray", engine)
    assert result.samples == 40
    assert (notes / "killed").exists()
    assert len(list(notes.glob("asked-by-*"))) >= 3  # two workers, and the one in the place of the dead
    assert sum(counted) == 40
    make(plan(SceneSource(40)), tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.mark.full
def test_near_duplicates_are_searched_over_all_workers(cluster, tmp_path):
    class Twice(SceneSource):
        def load(self, index):
            return super().load(index % 12)

    filtered = plan(Twice(20), filters=Filters(near_duplicates=0))
    result = prepare(filtered, tmp_path / "ray", partial(run_ray, workers=2))
    assert (result.samples, result.skipped) == (12, {"near-duplicate": 8})
    make(filtered, tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_a_set_begun_by_one_engine_is_finished_by_the_other(cluster, tmp_path):
    class Stopping(SceneSource):
        def load(self, index):
            if index == 12:
                raise KeyboardInterrupt
            return super().load(index)

    with pytest.raises(KeyboardInterrupt):
        make(plan(Stopping(20)), tmp_path / "both")
    prepare(plan(SceneSource(20)), tmp_path / "both", partial(run_ray, workers=2))
    make(plan(SceneSource(20)), tmp_path / "local")
    assert digests(tmp_path / "both") == digests(tmp_path / "local")


def test_sigterm_stays_the_callers(monkeypatch, tmp_path):
    def taking(**arguments):  # as Ray does when it starts
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        raise RuntimeError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", taking)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="no cluster"):
        prepare(plan(SceneSource(2)), tmp_path / "out", run_ray)
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_ray_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused("the package ray", MISSING, hint="pip install 'ray[data]'"):
        prepare(plan(SceneSource(2)), tmp_path, run_ray)
