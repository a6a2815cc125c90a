"""Several processes that train together, and one that does their work alone."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tests.training.runs import LONG, config, run, same_to_the_bit, stopped_in, write_images

from nexus_adapters.training.loop import Stopped
from nexus_adapters.training.recipe import dump_config

WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"
OPTIONS = {
    "training__max_train_steps": 4,
    "training__learning_rate": 1e-3,
    "validation__every_steps": 4,
    "validation__images": 1,
    "training__gradient_accumulation_steps": 2,
    "log__every_steps": 1,
}


def launch(root, out, **changes):
    """`nexus train` in two processes, each on a thread of its own."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(dump_config(config(root, out, **OPTIONS | changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, "-m", "nexus_adapters.cli", "train", str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """A run of two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    assert fork(root, out, **OPTIONS) == [0, 0]
    return out


def test_two_are_as_one_with_the_same_global_batch(root, two, tmp_path):
    run(root, tmp_path / "one", **OPTIONS | {"training__batch_size": 4})
    ours, theirs = load_file(two / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-4), name
    for row, other in zip(logged(two), logged(tmp_path / "one"), strict=True):
        assert row["step"] == other["step"]
        for name in {"loss", "val_loss", "val_loss_0500"} & set(row):
            assert row[name] == pytest.approx(other[name], rel=1e-3)


@pytest.mark.full
def test_two_that_torchrun_started_and_stopped_resume_to_the_same_bits(root, two, tmp_path):
    out = tmp_path / "stopped"
    process = launch(root, out, checkpoint__every_steps=1)
    while not (out / "checkpoints" / "step-00000001").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not (out / "adapter").exists()
    process = launch(root, out, checkpoint__every_steps=1)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    ours, theirs = load_file(out / WEIGHTS), load_file(two / WEIGHTS)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def child(rank, port, root, out, stop, changes):
    """One of two processes, which `stop` surrounds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # or Accelerate chooses, and they get into each other's way
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate has no other way
    try:
        with stop if rank == 0 else nullcontext():
            run(root, out, **changes)
    except Stopped as stop:
        os._exit(stop.exit_status)
    os._exit(0)


def fork(root, out, stop=nullcontext(), **changes):  # noqa: B008  # it has no state
    """The exit statuses of two processes, forked to save imports. `stop`: around the first one's run."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=child, args=(rank, port, root, out, stop, changes)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
    return [process.exitcode for process in processes]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def long_run(root, watched, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "out"
    assert fork(root, out, **LONG) == [0, 0]
    return out


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step == 6 else pytest.mark.full) for step in range(11)]
)
def test_two_stopped_at_any_step_resume_to_the_same_bits(root, tmp_path, watched, long_run, step):
    """Weights, optimizer, average, and the loss of every step, with dropout, over four epochs."""
    out = tmp_path / "out"
    assert fork(root, out, stopped_in(watched, step), **LONG) == [143, 143]
    assert fork(root, out, **LONG) == [0, 0]
    assert same_to_the_bit(out, long_run, 12)


def test_unreadable_samples_of_all_processes_count_together(root, tmp_path):
    """Without a cache each process meets its own; each is reported once."""
    folder = write_images(tmp_path / "images", count=8)
    for index in (0, 5):
        (folder / f"{index:02d}.png").write_bytes(b"none")
    options = {"data__path": str(folder), "cache__enabled": False, "data__max_bad_fraction": 0.5}
    assert fork(root, tmp_path / "out", **options) == [0, 0]  # an epoch
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == [0, 5]
