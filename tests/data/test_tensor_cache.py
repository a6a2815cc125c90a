import os
import pickle

import pytest
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


def test_it_can_be_handed_to_other_processes(tmp_path):
    cache = TensorCache(tmp_path)
    cache.write({"x": entry(1)})
    cache.read("x")
    assert same(pickle.loads(pickle.dumps(cache)).read("x"), entry(1))


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_a_shard_that_cannot_be_read_is_told_with_its_path(tmp_path, content):
    (tmp_path / "shard-1.safetensors").write_bytes(content)
    with refused("cache.folder", f"'{tmp_path / 'shard-1.safetensors'}'"):
        TensorCache(tmp_path)


def test_a_shard_that_was_cut_short_is_told(tmp_path):
    TensorCache(tmp_path).write({"x": entry(1, (100,))})
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:-50])
    with refused("cache.folder", f"'{shard}'", hint="Delete"):
        TensorCache(tmp_path)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cache.folder", f"'{tmp_path / 'file'}'"):
        TensorCache(tmp_path / "file")
