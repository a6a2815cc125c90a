import hashlib
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tests.data.image_files import picture
from tests.data.tar_files import members, tar
from tests.refusals import refused

from nexus_adapters.data.conditioned import KnownHashes
from nexus_adapters.data.shards import Limits, LocalShard, RemoteShard, find_shards
from nexus_adapters.data.tars import TarSource


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
    odd = folder / "set [v1] {1..2}"
    odd.mkdir()
    (odd / "a.tar").write_bytes(b"tar")
    assert names(str(odd / "a.tar")) == [str(odd / "a.tar")]
    (folder / "[v1]").mkdir()
    (folder / "[v1]" / "a.tar").write_bytes(b"tar")
    assert names("[v1]/*.tar") == ["[v1]/a.tar"]
    assert names("a-00[01].tar") == ["a-000.tar", "a-001.tar"]
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
        (["a-{0..99999999}.tar"], "{0..99999999} in", "ranges of at most 100,000 files"),
        (["https://host/{0..999}/{0..999}.tar"], "{0..999} in", "ranges of at most 100,000 files"),
        (["a-{0..100000}.tar"], "{0..100000} in", "ranges of at most 100,000 files"),
        (["a-{0..%s}.tar" % ("9" * 5000)], "{0..999", "ranges of at most 100,000 files"),
        (["a-{3..1}.tar"], "{3..1} in 'a-{3..1}.tar'", "ascending range"),
    ],
)
def test_bad_lists(folder, patterns, received, expected):
    with refused("shards", received, expected=expected):
        find_shards(patterns, folder, 8)


class Server:
    """A server of a few files that supports no ranges and, where `knows_head` is False, no HEAD."""

    def __init__(self):
        self.files, self.requests, self.failures = {}, Counter(), Counter()
        self.knows_head = True
        self.cuts = 0  # so many answers end early
        self.gives_length = True
        self.drips = False  # sends a byte now and then

    def handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                assert "Range" not in self.headers
                self.answer(with_body=True)

            def answer(self, with_body):
                path = self.path.partition("?")[0]
                server.requests[self.command, path] += 1
                content = server.files.get(path)
                status = 200
                if server.failures[path] > 0:
                    server.failures[path] -= 1
                    status = 503
                elif content is None:
                    status = 404
                elif not with_body and not server.knows_head:
                    status = 405
                self.send_response(status)
                if status != 200:
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if server.gives_length:
                    self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", hashlib.sha256(content).hexdigest()[:8])
                self.end_headers()
                if with_body and server.cuts > 0:
                    server.cuts -= 1
                    content = content[:1000]
                if with_body and server.drips:
                    with suppress(OSError):
                        for byte in content[:200]:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.01)
                elif with_body:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler

    def gets(self):
        return {path: count for (command, path), count in self.requests.items() if command == "GET"}


@contextmanager
def served():
    server = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), server.handler())
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with served() as server:
        for shard in range(4):
            server.files[f"/{shard}.tar"] = tar(members(range(shard * 3, shard * 3 + 3)))
        yield server


def opened(server, folder, shards="{0..3}", **options):
    return TarSource([f"{server.url}/{shards}.tar?token=secret"], index_folder=folder, **options)


def test_samples_from_a_server_without_ranges(server, tmp_path):
    source = opened(server, tmp_path)
    assert len(source) == 12
    for index in (0, 11, 5):
        sample = source.load(index)
        assert sample.key == f"{server.url}/{index // 3}.tar/{index:05d}"  # without the token
        assert np.array_equal(sample.image, picture(index))
        assert source.size(index) == (24, 16)
    assert server.gets() == {f"/{shard}.tar": 1 for shard in range(4)}


def test_the_next_run_fetches_only_what_it_reads(server, tmp_path):
    opened(server, tmp_path, keep_shards=1)
    server.requests.clear()
    source = opened(server, tmp_path, keep_shards=1)
    assert server.gets() == {}
    assert source.load(4).captions == ("picture 4",)
    assert source.load(3).captions == ("picture 3",)
    assert server.gets() == {"/1.tar": 1}


def test_the_next_run_fetches_nothing_to_know_the_samples(server, tmp_path):
    def hashes():
        source = opened(server, tmp_path, keep_shards=1)
        with KnownHashes(tmp_path / "hashes.jsonl").kept() as known:
            return [known.content_hash(source, index) for index in range(12)]

    before = hashes()
    server.requests.clear()
    assert hashes() == before
    assert server.gets() == {}
    server.files["/2.tar"] = tar(members(range(60, 63)))
    assert [ours == theirs for ours, theirs in zip(hashes(), before, strict=True)] == [
        index not in (6, 7, 8) for index in range(12)
    ]
    assert set(server.gets()) == {"/2.tar"}


def test_the_least_recently_used_go(server, tmp_path):
    source = opened(server, tmp_path, keep_shards=2)
    kept = tmp_path / "shards"
    assert len(list(kept.glob("*.tar"))) == 2  # 2 and 3
    for file in kept.glob("*.tar"):
        os.utime(file, (0, 0))

    def load(index, turn):
        source.load(index)
        for file in kept.glob("*.tar"):  # a clock whose ticks are far apart
            if file.stat().st_mtime > 10**6:
                os.utime(file, (turn, turn))

    server.requests.clear()
    # Of shards 0, 1, 0, 2, 0, 1: as 2 comes, 1 goes, and as 1 comes again, 2 does.
    for turn, index in enumerate((0, 3, 0, 6, 0, 3), start=1):
        load(index, turn)
    assert server.gets() == {"/0.tar": 1, "/1.tar": 2, "/2.tar": 1}
    assert len(list(kept.glob("*.tar"))) == 2
    assert list(kept.glob(".unfinished-*")) == []


def test_several_readers_fetch_a_shard_once(server, tmp_path):
    source = opened(server, tmp_path)
    for file in (tmp_path / "shards").glob("*.tar"):
        file.unlink()
    server.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        captions = list(pool.map(lambda index: source.load(index % 3).captions[0], range(24)))
    assert Counter(captions) == {f"picture {n}": 8 for n in range(3)}
    assert server.gets() == {"/0.tar": 1}


def test_a_shard_that_has_changed_is_indexed_anew(server, tmp_path):
    assert len(opened(server, tmp_path)) == 12
    server.files["/2.tar"] = tar(members(range(6, 8)))
    server.requests.clear()
    source = opened(server, tmp_path)
    assert len(source) == 11
    assert server.gets() == {"/2.tar": 1}
    assert source.load(8).captions == ("picture 9",)


def test_servers_without_head_are_trusted_to_have_the_same(server, tmp_path):
    server.knows_head = False
    assert len(opened(server, tmp_path)) == 12
    assert len(opened(server, tmp_path)) == 12
    assert set(server.gets().values()) == {1}


def shard_of(server, folder, name="0.tar", **options):
    """A shard that is tried three times, without waits."""
    return RemoteShard(f"{server.url}/{name}?token=secret", folder, 1, waits_s=(0.0, 0.0), **options)


def test_a_cut_answer_of_unknown_length_is_not_kept(server, tmp_path):
    server.gives_length = False
    server.cuts = 2
    with shard_of(server, tmp_path).open("") as file:
        assert file.read() == server.files["/0.tar"]
    assert server.gets() == {"/0.tar": 3}
    server.cuts = 9
    with pytest.raises(OSError, match="after 1000 bytes, before the end of the tar"):
        shard_of(server, tmp_path, "1.tar").open("")
    assert len(list(tmp_path.glob("*.tar"))) == 1


@pytest.mark.parametrize("gives_length", [True, False])
def test_a_shard_above_the_limit_is_refused_before_it_fills_the_disk(server, tmp_path, gives_length):
    server.gives_length = gives_length
    with refused("shards", "/0.tar' of", expected="at most 2,000 bytes") as caught:
        shard_of(server, tmp_path, limits=Limits(most_bytes=2000)).open("")
    assert "secret" not in str(caught.value)
    assert list(tmp_path.glob("*.tar")) == list(tmp_path.glob(".unfinished-*")) == []
    assert server.gets() == {"/0.tar": 1}


def test_a_server_that_drips_is_given_up(server, tmp_path):
    server.drips = True
    with pytest.raises(OSError, match="too slow"):
        shard_of(server, tmp_path, limits=Limits(least_rate=10_000.0, grace_s=0.05)).open("")
    assert not list(tmp_path.glob("*.tar"))


def test_a_failure_that_passes_is_tried_again(server, tmp_path):
    server.cuts = 1
    server.failures["/0.tar"] = 1
    with shard_of(server, tmp_path).open("") as file:
        assert file.read() == server.files["/0.tar"]
    assert server.gets() == {"/0.tar": 3}


def test_failures_that_stay_are_one_clear_error_without_secrets(server, tmp_path):
    server.cuts = 9
    with pytest.raises(
        OSError, match=r"^cannot download 'http://127.*\.tar' \(OSError: .* after 1000 of \d+ bytes"
    ) as failed:
        shard_of(server, tmp_path).open("")
    assert "secret" not in str(failed.value)
    assert not list(tmp_path.glob("*.tar"))
    assert server.gets() == {"/0.tar": 3}
    server.requests.clear()
    with refused("shards", "/9.tar' (HTTPError: ") as caught:
        shard_of(server, tmp_path, "9.tar").open("")
    assert "404" in str(caught.value.received)
    assert "secret" not in str(caught.value)
    assert server.gets() == {"/9.tar": 1}  # once is enough


def test_nobody_there(server, tmp_path):
    source = opened(server, tmp_path, keep_shards=1)
    gone = RemoteShard("http://127.0.0.1:1/a.tar", tmp_path, 1, waits_s=())
    assert gone.version() is None
    with pytest.raises(OSError, match=r"^cannot download 'http://127\.0\.0\.1:1/a\.tar' \(URLError"):
        gone.open("")
    assert source.load(11).captions == ("picture 11",)


def test_a_file_that_a_killed_process_left_is_not_used_and_goes(server, tmp_path):
    shard = RemoteShard(f"{server.url}/0.tar", tmp_path, 1)
    version = shard.version()
    with shard.open(version) as file:
        whole = file.read()
    (kept,) = tmp_path.glob("*.tar")
    old, new = (tmp_path / f".unfinished-{kept.name}-{number}" for number in range(2))
    kept.rename(old)
    new.touch()
    os.utime(old, (0, 0))
    with shard.open(version) as file:
        assert file.read() == whole
    assert list(tmp_path.glob(".unfinished-*")) == [new]  # somebody may be writing to that one


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:pass@host:8/a/b.tar?X-Amz-Signature=1#f", "https://host:8/a/b.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("hf://datasets/me/set/a.tar", "hf://datasets/me/set/a.tar"),
    ],
)
def test_names_hold_no_secrets(tmp_path, url, name):
    assert RemoteShard(url, tmp_path, 1).name == name


def test_any_file_system_of_fsspec(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/nexus-test/a.tar", tar(members(range(2))))
    try:
        source = TarSource(["memory://nexus-test/a.tar"], index_folder=tmp_path)
        assert source.load(1).captions == ("picture 1",)
        assert source.key(1) == "memory://nexus-test/a.tar/00001"
    finally:
        files.rm("/nexus-test", recursive=True)
    with refused("shards", "'memory://nexus-test/gone.tar' (FileNotFoundError"):
        TarSource(["memory://nexus-test/gone.tar"], index_folder=tmp_path)


def test_urls_that_nobody_reads(tmp_path):
    with refused("shards", "nosuch:// (", expected="fsspec"):
        TarSource(["nosuch://host/a.tar"], index_folder=tmp_path)
