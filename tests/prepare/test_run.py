"""Interruptions, of any kind and at any moment, leave a set as it would have been without."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial

import psutil
import pytest
from tests.conditions import tiny_models
from tests.data.image_files import encoded, picture
from tests.prepare.sets import digests, index, make, samples, skipped, write_folder
from tests.refusals import refused

from nexus_adapters import __version__
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.prepared_set import SetFolder
from nexus_adapters.data.samples import Sample
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.prepare.engines import run_local
from nexus_adapters.prepare.filters import Filters
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.run import Result, check_out, prepare

FILES = ["00000.tar", "00001.tar", "00002.tar", "index.json", "preview.html", "skipped.jsonl"]


def plan(count=25, **changes):
    settings = {
        "conditions": {"canny": {}, "sketch": {}},
        "shard_size": 10,
        "filters": Filters(near_duplicates=4),
    }
    return Plan(SceneSource(count), **settings | changes)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A set whose making was never stopped."""
    out = tmp_path_factory.mktemp("expected")
    assert make(plan(), out).samples == 25
    return digests(out)


def test_a_set_is_numbered_tars_an_index_a_list_and_a_page(expected, tmp_path):
    make(plan(), tmp_path)
    assert sorted(expected) == FILES
    found = index(tmp_path)
    assert (found["samples"], found["skipped"], found["conditions"]) == (25, {}, ["canny", "sketch"])
    for shard, samples_in_it in zip(found["shards"], (10, 10, 5), strict=True):
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard == {
            "file": shard["file"],
            "samples": samples_in_it,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert found["settings"]["conditions"]["canny"] == {"low": 100, "high": 200, "auto": False}


def test_a_finished_set_is_left_alone(expected, tmp_path):
    make(plan(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = make(plan(), tmp_path)
    assert (result.samples, result.was_finished) == (25, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("damage", ["missing", "cut", "grown"])
def test_a_finished_set_without_its_shards_is_not_finished(tmp_path, damage):
    set_of = partial(plan, count=3, filters=Filters(), shard_size=2, conditions={"canny": {}})
    make(set_of(), tmp_path)
    shard = tmp_path / "00001.tar"
    size = shard.stat().st_size
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, size + (-1 if damage == "cut" else 1))
    found = {"missing": "no such file", "cut": f"{size - 1} bytes", "grown": f"{size + 1} bytes"}[damage]
    with refused("out", found, expected=f"'{shard}' with {size} bytes", hint="delete"):
        make(set_of(), tmp_path)
    with refused("out", found, expected=f"'{shard}' with {size} bytes", hint="delete"):
        check_out(SetFolder(tmp_path), set_of().settings())


def test_processes_make_the_same_set(expected, tmp_path):
    make(plan(), tmp_path, workers=2)
    assert digests(tmp_path) == expected


class Stop(Exception):  # noqa: N818  # it stands for a signal
    """From within a source."""


class StoppingSource(SceneSource):
    """Fails after so many samples, as a process that is ended does."""

    left = 0

    def load(self, index):
        if self.left == 0:
            raise Stop
        self.left -= 1
        return super().load(index)


@pytest.mark.parametrize(
    "after", [0, 13, 39, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 9, 10, 24, 25, 26, 45, 49))]
)
def test_a_stop_after_any_sample_changes_nothing(expected, tmp_path, after):
    stopping = plan()
    object.__setattr__(stopping, "source", source := StoppingSource(25))
    source.left = after
    with pytest.raises(Stop):
        make(stopping, tmp_path)
    assert not (tmp_path / "index.json").exists()
    make(plan(), tmp_path)
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("after", ["survey", "write"])
def test_a_stop_between_the_steps_changes_nothing(expected, tmp_path, after):
    def engine(plan, folder, step, *rest):
        run_local(plan, folder, step, *rest)
        if step == after:
            raise Stop

    with pytest.raises(Stop):
        prepare(plan(), tmp_path, engine)
    make(plan(), tmp_path)
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("name", ["preview.html", "index.json"])
def test_a_stop_at_the_end_changes_nothing(expected, tmp_path, name):
    def engine(plan, folder, step, *rest):
        run_local(plan, folder, step, *rest)
        (tmp_path / name).mkdir(exist_ok=True)  # so that this file cannot be written

    with pytest.raises(OSError, match=name):
        prepare(plan(), tmp_path, engine)
    (tmp_path / name).rmdir()
    make(plan(), tmp_path)
    assert digests(tmp_path) == expected


def test_a_stop_after_the_index_leaves_nothing_behind(expected, tmp_path):
    make(plan(), tmp_path)
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "00000.json").write_text("{}")
    assert make(plan(), tmp_path).was_finished
    assert digests(tmp_path) == expected


CHILD = """
import sys
from pathlib import Path
from tests.prepare.sets import make
from tests.prepare.test_run import plan
print("ready", flush=True)
make(plan(), Path(sys.argv[1]), int(sys.argv[2]))
"""


def child(out, workers):
    """A process of its own, to be killed, which begins to make the set."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, out, str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_any_moment_change_nothing(expected, tmp_path, workers):
    kills = 0
    for attempt in range(100):
        process = child(tmp_path, workers)
        try:  # later and later, until one comes to its end
            _, errors = process.communicate(timeout=0.3 * attempt)
            assert process.returncode == 0, errors
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    make(plan(), tmp_path)
    assert kills >= 3
    assert digests(tmp_path) == expected


@pytest.mark.full
def test_orphans_end_with_their_parent(expected, tmp_path):
    """Or they would write into the folder of the run that resumes."""
    process = child(tmp_path, 2)
    workers: list[psutil.Process] = []
    while len(workers) < 2 and process.poll() is None:
        children = psutil.Process(process.pid).children()
        workers = [worker for worker in children if "spawn_main" in " ".join(worker.cmdline())]
        time.sleep(0.02)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    make(plan(), tmp_path)
    assert digests(tmp_path) == expected


def test_a_worker_that_is_killed_is_reported_and_the_same_command_resumes(expected, tmp_path):
    def kill_one(_):
        for process in multiprocessing.active_children()[:1]:
            os.kill(process.pid, signal.SIGKILL)

    def engine(plan, folder, step, shards, progress):
        run_local(plan, folder, step, shards, kill_one, workers=2)

    with pytest.raises(OSError, match=r"worker process was killed.* to resume"):
        prepare(plan(), tmp_path, engine)
    make(plan(), tmp_path)
    assert digests(tmp_path) == expected


def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    def second(*_, **__):
        with refused("out", f"'{tmp_path}'", expected="no other run"):
            make(plan(), tmp_path)
        raise Stop

    with pytest.raises(Stop):
        prepare(plan(), tmp_path, second)


SMALL = {"source": SceneSource(25), "conditions": {"canny": {}}, "shard_size": 10}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    make(Plan(**SMALL), folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "name", "before", "now"),
    [
        ({"captions": "first"}, "captions", "all", "first"),
        ({"seed": 9}, "seed", "0", "9"),
        ({"filters": Filters(min_side=3)}, "filters.min_side", "0", "3"),
        ({"filters": Filters(near_duplicates=3)}, "filters.near_duplicates", "no value", "3"),
        ({"geometry": Geometry(32, 32)}, "geometry.width", "no value", "32"),
        ({"conditions": {"canny": {"low": 3}}}, "conditions.canny.low", "", "3"),
        ({"conditions": {"canny": {}, "sketch": {}}}, "conditions", "canny as in", "canny, sketch"),
        ({"source": SceneSource(26)}, "source", "25 samples", "26 samples"),
        ({"source": SceneSource(25, first_seed=1)}, "source", "", "other samples"),
        (
            {"source": SceneSource(26), "source_settings": {"split": "test"}},
            "source.split",
            "no value",
            "test",
        ),
    ],
)
def test_other_settings_are_refused(begun, changes, name, before, now):
    with pytest.raises(InvalidArgument) as caught:
        make(Plan(**SMALL | changes), begun)
    assert (caught.value.name, caught.value.received) == (name, now)
    assert before in caught.value.expected
    assert f"'{begun}'" in caught.value.expected
    assert "new folder" in caught.value.hint


def test_other_weights_are_refused(tmp_path):
    model = tiny_models.segformer(tmp_path / "model")
    source, conditions = SceneSource(2), {"segmentation": {"model": model}}
    make(Plan(source, conditions), tmp_path / "set")
    tiny_models.segformer(tmp_path / "model", classes=133)
    with refused("conditions.segmentation.model", "other weights"):
        make(Plan(source, conditions), tmp_path / "set")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with refused("out", f"'{tmp_path}'", expected="a new or empty folder"):
        make(plan(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with refused("out", f"'{tmp_path / 'thesis.txt'}'", expected="a folder"):
        make(plan(), tmp_path / "thesis.txt")


def test_a_version_of_the_package_reads_what_another_finished_but_does_not_resume_it(tmp_path):
    def made_by_another_version(file):
        file.write_text(file.read_text().replace(f'"version": "{__version__}"', '"version": "99"'))

    make(plan(), tmp_path / "set")
    stopping = plan()
    object.__setattr__(stopping, "source", StoppingSource(25))
    with pytest.raises(Stop):
        make(stopping, tmp_path / "begun")
    made_by_another_version(tmp_path / "set" / "index.json")
    made_by_another_version(tmp_path / "begun" / ".unfinished" / "settings.json")
    assert make(plan(), tmp_path / "set").was_finished
    with refused("out", "with 99", expected=f"version {__version__}"):
        make(plan(), tmp_path / "begun")


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    strict = plan(filters=Filters(min_side=1000))
    for _ in range(2):  # again, too
        with refused(
            "source", "25 samples, all of them left out (25 small)", hint=f"{tmp_path / 'skipped.jsonl'}"
        ):
            make(strict, tmp_path)
        assert len(skipped(tmp_path)) == 25
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.tar"))


def test_a_source_that_was_mended_is_read_anew(tmp_path):
    folder = write_folder(tmp_path / "images", 1)
    whole = (folder / "000.png").read_bytes()
    (folder / "000.png").write_bytes(b"broken")
    with refused("source", "1 samples, all of them left out (1 unreadable)"):
        make(Plan(FolderSource(folder), {"canny": {}}), tmp_path / "set")
    (folder / "000.png").write_bytes(whole)
    assert make(Plan(FolderSource(folder), {"canny": {}}), tmp_path / "set").samples == 1
    assert skipped(tmp_path / "set") == []


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "no JSON"])
def test_an_index_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with refused("out", f"'{tmp_path}', which has an index.json", expected="a new or empty folder"):
        make(plan(), tmp_path)
    assert (tmp_path / "index.json").read_text() == content


def test_shards_without_samples_are_not_written(tmp_path):
    folder = write_folder(tmp_path / "images", 12)
    for number in range(4, 8):
        (folder / f"{number:03d}.png").write_bytes(b"broken")
    make(Plan(FolderSource(folder), {"canny": {}}, shard_size=4), tmp_path / "set")
    assert [shard["file"] for shard in index(tmp_path / "set")["shards"]] == ["00000.tar", "00002.tar"]
    assert sorted(p.name for p in (tmp_path / "set").glob("*.tar")) == ["00000.tar", "00002.tar"]
    assert len(samples(tmp_path / "set")) == 8


def test_a_map_that_cannot_be_extracted_at_all_is_reported_before_the_work(tmp_path):
    with refused("conditions.depth.model", "'no/such'"):
        make(plan(conditions={"depth": {"model": "no/such"}}), tmp_path / "set")
    assert not (tmp_path / "set").exists()


class EndlessSource:
    """Pictures that are made when they are read."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def key(self, index):
        return f"picture {index}"

    def load(self, index):
        return Sample(self.key(index), picture(index, 16, 16), None, ("a picture",))


MEMORY = """
import resource, sys
from pathlib import Path
from functools import partial
from tests.prepare.test_run import EndlessSource
from nexus_adapters.prepare.engines import run_local
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.run import check_out, prepare
out, counts = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
for count in counts:
    prepare(Plan(EndlessSource(count), {"canny": {}}, shard_size=100), out / str(count), partial(run_local))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class CountingSource(SceneSource):
    """`most`: images that existed at once."""

    def __init__(self, count):
        super().__init__(count)
        self.most, self.loaded = 0, []

    def load(self, index):
        sample = super().load(index)
        self.loaded.append(weakref.ref(sample.image))
        self.most = max(self.most, sum(image() is not None for image in self.loaded))
        return sample


def test_only_a_batch_of_samples_is_in_memory(tmp_path):
    source = CountingSource(40)
    make(Plan(source, {"canny": {}}, shard_size=20, batch_size=4), tmp_path)
    assert 4 <= source.most <= 9  # the batch before may not be deleted yet


@pytest.mark.full
def test_memory_does_not_grow_with_the_source(tmp_path):
    """Twice: for what the first samples load, and then for ten times as many."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, "600", "6000"], capture_output=True, text=True, check=True
    )
    first, second = map(int, ran.stdout.split())
    assert second - first < 4 * 1024  # KiB; 5,400 samples more, of which each would have 0.75 KiB


def test_the_list_of_what_is_left_out_keeps_the_sources_order_and_progress_counts_all(tmp_path):
    folder = write_folder(tmp_path / "images", 10)
    for number in (8, 1, 5):
        (folder / f"{number:03d}.txt").unlink()
    seen = []

    def engine(plan, folder, step, shards, progress):
        run_local(plan, folder, step, shards, lambda count: (seen.append(count), progress(count)), workers=2)

    made = Plan(FolderSource(folder), {"canny": {}}, shard_size=3, root=f"{folder}/")
    prepare(made, tmp_path / "set", engine)
    assert [row["source"] for row in skipped(tmp_path / "set")] == ["001.png", "005.png", "008.png"]
    assert json.loads((tmp_path / "set" / "index.json").read_text())["skipped"] == {"unreadable": 3}
    assert sum(seen) == 10


def test_conditions_have_one_order_whatever_was_asked_for(expected, tmp_path):
    make(plan(conditions={"sketch": {}, "canny": {}}), tmp_path)
    assert digests(tmp_path) == expected


def test_names_and_captions_that_utf8_cannot_say(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    data = folder / "data"
    data.mkdir()
    for number, name in enumerate((b"\xff.png", "Blüte.png".encode())):
        path = os.path.join(os.fsencode(data), name)
        with open(path, "wb") as file:
            file.write(encoded(picture(number)))
    monkeypatch.chdir(tmp_path)
    lines = [
        '{"file_name": "data/Bl\\u00fcte.png", "text": "a picture"}',
        '{"file_name": "data/\\udcff.png", "text": "a picture"}',
        '{"file_name": "data/Bl\\u00fcte.png", "text": "lone \\ud800 half"}',
        '{"file_name": "data/\\ud800.png", "text": "none"}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    make(Plan(FolderSource("a"), {"canny": {}}, root="a/"), tmp_path / "set")
    found = [json.loads(files["json"]) for files in samples(tmp_path / "set").values()]
    assert [about["source"] for about in found] == ["data/Blüte.png", "data/\ufffd.png"]
    text, file = skipped(tmp_path / "set")
    assert (text["source"], text["reason"].startswith("captions: ")) == ("data/Blüte.png", True)
    # An error shows the half of a surrogate pair as an escape, as it does on a terminal.
    assert (file["source"], "'data/\\ud800.png'" in file["reason"]) == ("data/\ufffd.png", True)


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ({"small": 1}, "1 sample (1 small)"),
        ({"small": 1, "near-duplicate": 2}, "3 samples (2 near-duplicate, 1 small)"),
    ],
)
def test_a_result_names_what_was_left_out(skipped, expected):
    assert Result(5, Counter(skipped)).left_out == expected
