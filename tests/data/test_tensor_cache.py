import os
import pickle
import re
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.refusals import refused

from nexus_adapters.data.tensor_cache import TensorCache


def entry(value, shape=(2, 3)):
    return {"mean": torch.full(shape, float(value)), "condition": torch.tensor([value], dtype=torch.uint8)}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_was_written_comes_back(tmp_path):
    cache = TensorCache(tmp_path / "a" / "cache")
    cache.write({"x": entry(1), "y": entry(2, (5,))})
    assert same(cache.read("y"), entry(2, (5,)))
    assert same(TensorCache(tmp_path / "a" / "cache").read("x"), entry(1))


def test_what_is_missing_is_listed_once_in_order(tmp_path):
    cache = TensorCache(tmp_path)
    cache.write({"b": entry(1)})
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]
    with pytest.raises(KeyError):
        cache.read("c")


def test_what_others_wrote_is_seen_after_a_refresh(tmp_path):
    cache, other = TensorCache(tmp_path), TensorCache(tmp_path)
    other.write({"x": entry(3)})
    assert "x" not in cache
    cache.refresh()
    assert same(cache.read("x"), entry(3))


def test_nothing_to_write_makes_no_file(tmp_path):
    TensorCache(tmp_path).write({})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    cache = TensorCache(tmp_path)

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        cache.write({"x": entry(1)})
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_goes_in_time(tmp_path):
    left = tmp_path / ".unfinished-shard-0.safetensors-0123abcd"
    left.write_bytes(b"x")
    TensorCache(tmp_path)
    assert left.exists()  # somebody may be at it
    os.utime(left, (0, 0))
    TensorCache(tmp_path)
    assert not left.exists()


def killed_while_writing(folder):
    """A process that is killed when safetensors has begun its own temporary file; the process's entry."""
    pid = os.fork()
    if pid == 0:
        try:
            cache = TensorCache(folder)

            def save_file(tensors, path, metadata):
                (Path(path).parent / ".tmpHalf01").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

            safetensors.torch.save_file = save_file
            cache.write({"x": entry(1)})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_a_kill_left_of_a_shard_goes_at_the_next_start(tmp_path):
    TensorCache(tmp_path).write({"y": entry(2)})
    for _ in range(2):
        killed_while_writing(tmp_path)
    assert list(tmp_path.rglob(".tmp*"))
    cache = TensorCache(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    assert same(cache.read("y"), entry(2))
    assert cache.missing(["x", "y"]) == ["x"]


def test_what_another_process_is_writing_stays(tmp_path, monkeypatch):
    """Also in the moment in which it has made its lock file but does not hold it yet."""
    cache, save = TensorCache(tmp_path), safetensors.torch.save_file

    def meanwhile(tensors, path, metadata):
        TensorCache(tmp_path)
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", meanwhile)
    cache.write({"x": entry(1)})
    (tmp_path / ".writing-shard-0123.safetensors").touch()
    TensorCache(tmp_path)
    assert same(TensorCache(tmp_path).read("x"), entry(1))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no flock")

    monkeypatch.setattr("nexus_adapters.data.tensor_cache.lock", refuse)
    TensorCache(tmp_path).write({"x": entry(1)})
    assert same(TensorCache(tmp_path).read("x"), entry(1))
    assert len(list(tmp_path.iterdir())) == 1


def test_it_can_be_handed_to_other_processes(tmp_path):
    cache = TensorCache(tmp_path)
    cache.write({"x": entry(1)})
    cache.read("x")
    assert same(pickle.loads(pickle.dumps(cache)).read("x"), entry(1))


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_shard_that_cannot_be_read_is_set_aside(tmp_path, content):
    (tmp_path / "shard-1.safetensors").write_bytes(content)
    with pytest.warns(
        UserWarning, match=re.escape(f"'{tmp_path / 'shard-1.safetensors.damaged'}' is damaged")
    ):
        TensorCache(tmp_path)
    assert (tmp_path / "shard-1.safetensors.damaged").read_bytes() == content


def test_the_entries_of_a_shard_that_was_cut_short_are_computed_again(tmp_path):
    TensorCache(tmp_path).write({"x": entry(1, (100,))})
    TensorCache(tmp_path).write({"y": entry(2)})
    shard = next(file for file in tmp_path.iterdir() if file.stat().st_size > 300)
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="computed again"):
        cache = TensorCache(tmp_path)
    assert cache.missing(["x", "y"]) == ["x"]
    cache.write({"x": entry(1, (100,))})
    assert same(TensorCache(tmp_path).read("x"), entry(1, (100,)))  # and no further warning


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cache.folder", f"'{tmp_path / 'file'}'"):
        TensorCache(tmp_path / "file")
