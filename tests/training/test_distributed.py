"""Several processes that train together, and one that does their work alone."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tests import tiny
from tests.training.runs import LONG, config, run, same_to_the_bit, stopped_after, write_images

from nexus_adapters.training import run as module
from nexus_adapters.training.loop import Stopped
from nexus_adapters.training.recipe import dump_config

WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"
OPTIONS = {
    "training__max_train_steps": 8,
    "training__learning_rate": 1e-3,
    "validation__every_steps": 4,
    "validation__images": 1,
    "training__gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    tiny.sd15().save_pretrained(root / "base")
    write_images(root / "images", count=24)
    return root


def launch(root, out, **changes):
    """`nexus train` in two processes, each on a thread of its own."""
    recipe = root / f"{out.name}.toml"
    recipe.write_text(dump_config(config(root, out, **OPTIONS | changes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, "-m", "nexus_adapters.cli", "train", str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]


def logged(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(root):
    finish(launch(root, root / "two"))
    return root / "two"


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


def test_two_that_were_stopped_go_on_to_the_same_bits(root, two):
    out = root / "stopped"
    process = launch(root, out, checkpoint__every_steps=1)
    while not (out / "checkpoints" / "step-00000002").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not (out / "adapter").exists()
    finish(launch(root, out, checkpoint__every_steps=1))
    ours, theirs = load_file(out / WEIGHTS), load_file(two / WEIGHTS)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def child(rank, port, root, out, step, changes):
    """One of two processes; the first one is stopped in the step after so many."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    if rank == 0 and step is not None:
        module.train = stopped_after(step)
    try:
        run(root, out, **changes)
    except Stopped as stop:
        os._exit(stop.exit_status)
    os._exit(0)


def fork(root, out, step=None, **changes):
    """The exit statuses of two processes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=child, args=(rank, port, root, out, step, changes)) for rank in (0, 1)
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
def long_run(root):
    write_images(root / "more", count=33)
    options = LONG | {"training__batch_size": 1, "data__path": str(root / "more")}
    assert fork(root, root / "long", **options) == [0, 0]
    return options


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in (9, 14) else pytest.mark.full) for step in range(23)]
)
def test_two_stopped_at_any_step_go_on_to_the_same_bits(root, tmp_path, long_run, step):
    """Weights, optimizer, average, and the loss of every step, with dropout, over three epochs."""
    out = tmp_path / "out"
    assert fork(root, out, step, **long_run) == [143, 143]
    assert fork(root, out, **long_run) == [0, 0]
    assert same_to_the_bit(out, root / "long", 24)


def test_unreadable_samples_of_all_processes_count_together(root, tmp_path):
    """Without a cache each process meets its own; each is reported once."""
    folder = write_images(tmp_path / "images", count=24)
    for index in range(0, 24, 4):
        (folder / f"{index:02d}.png").write_bytes(b"none")
    options = OPTIONS | {"data__path": str(folder), "cache__enabled": False, "validation__every_steps": 0}
    assert fork(root, tmp_path / "out", **options, data__max_bad_fraction=0.5) == [0, 0]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(0, 24, 4))
