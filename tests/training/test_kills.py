"""Runs that are killed at random moments, in other processes: all go on to the same weights."""

import hashlib
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from tests import tiny
from tests.training.runs import run, write_images

from nexus_adapters.training import checkpoint as checkpoints
from nexus_adapters.training.loop import Stopped

OPTIONS = {
    "training__max_train_steps": 40,
    "training__batch_size": 1,
    "checkpoint__every_steps": 2,
    "log__every_steps": 5,
    "training__ema_decay": 0.9,
}
WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    tiny.sd15().save_pretrained(root / "base")
    write_images(root / "images")
    return root


@pytest.fixture(scope="module")
def expected(root):
    run(root, root / "reference", **OPTIONS)
    return digest(root / "reference")


def digest(out):
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def child(root, out, in_save):
    """Runs to the end, or to where it is killed; says when a save begins, and takes its time over it."""
    torch.set_num_threads(1)
    real = checkpoints.save_tensors

    def slow(file, tensors):
        in_save.set()
        real(file, tensors)
        time.sleep(0.02)
        in_save.clear()

    checkpoints.save_tensors = slow
    try:
        run(root, out, **OPTIONS)
    except Stopped as stop:
        os._exit(stop.exit_status)
    os._exit(0)


def start(root, out):
    context = multiprocessing.get_context("fork")
    in_save = context.Event()
    process = context.Process(target=child, args=(root, out, in_save))
    process.start()
    return process, in_save


def kill_at_random(root, out, chance, number, wants_save):
    """Whether the child was killed inside a save; None where it had finished."""
    process, in_save = start(root, out)
    try:
        time.sleep(chance.uniform(0.2, 1.5))
        if wants_save:
            in_save.wait(timeout=30)
            time.sleep(chance.uniform(0, 0.02))
        was_saving = in_save.is_set()
        if process.is_alive():
            os.kill(process.pid, number)
    finally:
        process.join(timeout=60)
    if process.exitcode == 0:
        return None
    # A run that has not yet begun its steps has nothing to finish, and SIGTERM ends it like any other.
    assert process.exitcode in ({-number} if number == signal.SIGKILL else {-number, 128 + number})
    return was_saving


def check_kills(root, tmp_path, expected, number, kills, in_saves):
    """So many kills, over as many runs as they need; each run ends with the weights of one without any."""
    chance, done, saving, runs = random.Random(0), 0, 0, 0
    while done < kills or saving < in_saves:
        out = tmp_path / f"out-{runs}"
        while True:
            was_saving = kill_at_random(root, out, chance, number, wants_save=chance.random() < 0.8)
            if was_saving is None:
                break
            done, saving = done + 1, saving + was_saving
            if done >= kills and saving >= in_saves:
                process, _ = start(root, out)
                process.join(timeout=120)
                assert process.exitcode == 0
                break
        assert digest(out) == expected
        runs += 1
        assert runs < 200
    return done, saving


def test_a_few_kills(root, tmp_path, expected):
    check_kills(root, tmp_path, expected, signal.SIGKILL, kills=4, in_saves=2)


def test_a_few_terms(root, tmp_path, expected):
    check_kills(root, tmp_path, expected, signal.SIGTERM, kills=2, in_saves=0)


@pytest.mark.full
def test_25_kills_of_which_15_in_a_save(root, tmp_path, expected):
    print(check_kills(root, tmp_path, expected, signal.SIGKILL, kills=25, in_saves=15))


@pytest.mark.full
def test_10_terms(root, tmp_path, expected):
    print(check_kills(root, tmp_path, expected, signal.SIGTERM, kills=10, in_saves=0))
