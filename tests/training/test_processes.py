"""Several processes that train together, and one that does their work alone."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.training.runs import config, run, write_images

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
    _, errors = process.communicate(timeout=120)
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
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "adapter").exists()
    finish(launch(root, out, checkpoint__every_steps=1))
    ours, theirs = load_file(out / WEIGHTS), load_file(two / WEIGHTS)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
