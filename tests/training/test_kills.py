"""Runs that are killed at random moments, in other processes: resumed, all reach the same weights."""

import hashlib
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from tests.training.runs import run

from nexus_adapters.training.loop import Stopped

OPTIONS = {
    "training__max_train_steps": 20,
    "training__batch_size": 1,
    "checkpoint__every_steps": 2,
    "training__ema_decay": 0.9,
}
UNFINISHED = ".unfinished-"  # as the names of folders begin that are being written
WEIGHTS = "adapter/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("kills") / "reference"
    run(root, out, **OPTIONS)
    return digest(out)


def digest(out):
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def child(root, out):
    """Runs to the end, or to where it is killed."""
    torch.set_num_threads(1)
    try:
        run(root, out, **OPTIONS)
    except Stopped as stop:
        os._exit(stop.exit_status)
    os._exit(0)


def start(root, out):
    process = multiprocessing.get_context("fork").Process(target=child, args=(root, out))
    process.start()
    return process


def unfinished(out):
    """The checkpoints that are being written, or were when their process was killed."""
    return {path.name for path in (out / "checkpoints").glob(f"{UNFINISHED}*")}


def kill_at_random(root, out, chance, number, wants_save):
    """Whether the child was killed inside a save; None where it had finished."""
    left_over = unfinished(out)
    process = start(root, out)
    try:
        time.sleep(chance.uniform(0.2, 1.0))
        while wants_save and process.is_alive() and not unfinished(out) - left_over:
            time.sleep(0.0005)
        if process.is_alive():
            os.kill(process.pid, number)
    finally:
        process.join(timeout=60)
    if process.exitcode == 0:
        return None
    # A run that has not yet begun its steps has nothing to finish, and SIGTERM ends it like any other.
    assert process.exitcode in ({-number} if number == signal.SIGKILL else {-number, 128 + number})
    return bool(unfinished(out) - left_over)


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
                process = start(root, out)
                process.join(timeout=120)
                assert process.exitcode == 0
                break
        assert digest(out) == expected
        runs += 1
        assert runs < 200
    return done, saving


def test_a_few_kills(root, tmp_path, expected):
    check_kills(root, tmp_path, expected, signal.SIGKILL, kills=3, in_saves=1)


@pytest.mark.full
def test_25_kills_of_which_15_in_a_save(root, tmp_path, expected):
    print(check_kills(root, tmp_path, expected, signal.SIGKILL, kills=25, in_saves=15))


@pytest.mark.full
def test_10_terms(root, tmp_path, expected):
    print(check_kills(root, tmp_path, expected, signal.SIGTERM, kills=10, in_saves=0))
