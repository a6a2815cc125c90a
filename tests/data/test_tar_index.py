import io
import json
import os
import tarfile

import pytest
from tests.data.tar_files import members, tar
from tests.refusals import refused

from nexus_adapters.data import tar_index
from nexus_adapters.data.shards import LocalShard
from nexus_adapters.data.tar_index import find_index, index_tar
from nexus_adapters.errors import InvalidArgument


def indexed(path):
    with io.FileIO(path) as stream:
        return index_tar(stream, "a.tar", "1")


def test_members_with_place_and_size(tmp_path):
    given = [*members(range(3)), ("x" * 150 + "/ä.txt", b"a long name"), ("empty.txt", b"")]
    path = tmp_path / "a.tar"
    path.write_bytes(tar(given))
    index = indexed(path)
    content = path.read_bytes()
    assert [(name, content[offset : offset + size]) for name, offset, size in index.members] == given
    assert (index.is_whole, index.size, index.version) == (True, len(content), "1")


def test_folders_and_links_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in [
            ("sub", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert indexed(tmp_path / "a.tar").members == []


def test_only_headers_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar([(f"{n}.bin", bytes(10**6)) for n in range(5)]))
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            content = super().read(size)
            read.append(len(content))
            return content

    with Counting(tmp_path / "a.tar") as stream:
        assert len(index_tar(stream, "a", "").members) == 5
    assert sum(read) < 10_000


WHOLE = tar(members(range(4)))


@pytest.mark.parametrize("name", ["00002.jpg", "00002.canny.png", "00002.txt", "00003.jpg"])
@pytest.mark.parametrize(
    "where", ["before the header", "in the header", "in the content", "behind the content"]
)
def test_a_tar_that_ends_early_gives_its_whole_members(tmp_path, name, where):
    (tmp_path / "whole.tar").write_bytes(WHOLE)
    whole = indexed(tmp_path / "whole.tar").members
    number, (_, offset, size) = next((i, member) for i, member in enumerate(whole) if member[0] == name)
    end = {
        "before the header": offset - tarfile.BLOCKSIZE,
        "in the header": offset - 100,
        "in the content": offset + size - 1,
        "behind the content": offset + size,
    }[where]
    (tmp_path / "cut.tar").write_bytes(WHOLE[:end])
    cut = indexed(tmp_path / "cut.tar")
    assert not cut.is_whole
    assert cut.members == whole[: number + (where == "behind the content")]


def test_a_damaged_header_ends_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    whole = indexed(tmp_path / "a.tar").members
    header = whole[5][1] - tarfile.BLOCKSIZE
    (tmp_path / "a.tar").write_bytes(WHOLE[:header] + b"\xff" * 200 + WHOLE[header + 200 :])
    damaged = indexed(tmp_path / "a.tar")
    assert (damaged.is_whole, damaged.members) == (False, whole[:5])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a tar (empty file)"),
        (b"text " * 10, "is not a tar"),
        (b"text " * 1000, "is not a tar"),
        (WHOLE[:300], "is not a tar"),
        (b"\x1f\x8b\x08" + bytes(1000), "is compressed"),
    ],
)
def test_files_that_are_no_tars(tmp_path, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        indexed(tmp_path / "a.tar")
    assert (caught.value.name, caught.value.expected) == ("shards", "an uncompressed tar")
    assert str(caught.value.received).startswith(f"'a.tar', which {reason}")
    assert "\n" not in str(caught.value)


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    made = []
    original = tar_index.index_tar
    monkeypatch.setattr(tar_index, "index_tar", lambda *a: made.append(a) or original(*a))
    path = tmp_path / "a.tar"
    path.write_bytes(tar(members(range(2))))
    shard, kept = LocalShard(str(path)), tmp_path / "kept"
    first = find_index(shard, shard.version(), kept)
    assert find_index(shard, shard.version(), kept) == first
    assert find_index(shard, None, kept) == first  # as of a server that does not answer
    assert len(made) == 1
    path.write_bytes(tar(members(range(3))))
    assert len(find_index(shard, shard.version(), kept).members) == 9
    os.utime(path, ns=(1, 1))  # of the same size, but not the same
    find_index(shard, shard.version(), kept)
    assert len(made) == 3
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 0}', '{"format": 1, "members": [[1]]}'])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    shard, kept = LocalShard(str(tmp_path / "a.tar")), tmp_path / "kept"
    first = find_index(shard, shard.version(), kept)
    (file,) = kept.iterdir()
    assert set(json.loads(file.read_text())) == {"format", "version", "size", "is_whole", "members"}
    file.write_text(damage)
    assert find_index(shard, shard.version(), kept) == first


def test_one_warning_names_the_shard_that_ends_early(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE[:-11_000])
    shard = LocalShard(str(tmp_path / "a.tar"))
    for _ in range(2):  # whether the index is new or kept
        with pytest.warns(
            UserWarning, match=r"^shards: '.*a\.tar' ends early or is damaged; \d+ files"
        ) as caught:
            find_index(shard, shard.version(), tmp_path)
        assert len(caught) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    (tmp_path / "file").touch()
    shard = LocalShard(str(tmp_path / "a.tar"))
    with refused("index_folder", f"'{tmp_path / 'file'}'"):
        find_index(shard, shard.version(), tmp_path / "file")
