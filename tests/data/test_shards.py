from pathlib import Path

import pytest
from tests.refusals import refused

from nexus_adapters.data.remote import RemoteShard
from nexus_adapters.data.shards import LocalShard, find_shards


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ["a-000.tar", "a-001.tar", "a-002.tar", "a-010.tar", "b[1].tar", "sub/c.tar"]:
        (tmp_path / name).write_bytes(b"tar")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*patterns):
    return [shard.name for shard in find_shards(patterns, Path("shards"), 8)]


def test_paths_globs_and_ranges_in_the_order_in_which_they_are_listed(folder):
    assert names("a-001.tar", "a-000.tar") == ["a-001.tar", "a-000.tar"]
    assert names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar", "a-010.tar"]
    assert names("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("a-0{00..02}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("a-0{0..1}{0..0}.tar") == ["a-000.tar", "a-010.tar"]
    assert names("**/c.tar") == ["sub/c.tar"]
    assert names("b[1].tar") == ["b[1].tar"]  # a file of that name is meant, if there is one
    assert names(str(folder / "a-00?.tar"))[0] == str(folder / "a-000.tar")
    assert names("a-000.tar", "a-000.tar") == ["a-000.tar", "a-000.tar"]


def test_urls_and_their_ranges():
    url = "https://host/data-{0998..1001}.tar?sign=secret"
    shards = find_shards([url, "s3://bucket/x-{0..1}.tar"], Path("kept"), 8)
    assert all(isinstance(shard, RemoteShard) for shard in shards)
    assert [shard.place for shard in shards[:2]] == [
        "https://host/data-0998.tar?sign=secret",
        "https://host/data-0999.tar?sign=secret",
    ]
    assert [shard.name for shard in shards[3:]] == [
        "https://host/data-1001.tar",
        "s3://bucket/x-0.tar",
        "s3://bucket/x-1.tar",
    ]


def test_a_local_shard_has_a_version(folder):
    shard = LocalShard("a-000.tar")
    before = shard.version()
    assert before == shard.version()
    with shard.open(before) as file:
        assert file.read() == b"tar"
    (folder / "a-000.tar").write_bytes(b"other")
    assert shard.version() != before
    assert shard.place == str(folder / "a-000.tar")


@pytest.mark.parametrize(
    ("patterns", "received", "expected"),
    [
        ([], "[]", "a list of at least one path or URL"),
        ("a-000.tar", "'a-000.tar'", "a list of at least one path or URL"),
        (["c-*.tar"], "'c-*.tar', which matches no file", "tar files"),
        (["a-{000..003}.tar"], "'a-003.tar', which matches no file", "tar files"),
        (["sub"], "'sub', which is a folder", "tar files"),
        (["a-{3..1}.tar"], "{3..1} in 'a-{3..1}.tar'", "rising range"),
    ],
)
def test_bad_lists(folder, patterns, received, expected):
    with refused("shards", received, expected=expected):
        find_shards(patterns, folder, 8)
