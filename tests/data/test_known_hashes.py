import os

import pytest
from tests.data.image_files import encoded, picture

from nexus_adapters.data import stored
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.known_hashes import KnownHashes
from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.scene_source import SceneSource

COUNT = 5


@pytest.fixture
def folder(tmp_path):
    for index in range(COUNT):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index)))
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    return tmp_path


@pytest.fixture
def hashed(monkeypatch):
    """The names of files whose bytes are hashed."""
    found, original = [], stored._digest
    monkeypatch.setattr(stored, "_digest", lambda content: found.append(content.name) or original(content))
    return found


def hashes(folder, file):
    source = FolderSource(folder)
    with KnownHashes(file).kept() as known:
        found = [known.content_hash(source, index) for index in range(COUNT)]
    assert found == [source.content_hash(index) for index in range(COUNT)]
    return found


def test_only_what_changed_is_hashed_again(folder, tmp_path, hashed):
    file = tmp_path / "a" / "hashes.jsonl"
    before = hashes(folder, file)
    hashed.clear()
    assert hashes(folder, file) == before
    assert len(hashed) == COUNT  # the test's own
    (folder / "3.png").write_bytes(encoded(picture(99)))
    (folder / "1.txt").write_text("another")
    hashed.clear()
    after = hashes(folder, file)
    assert sorted(hashed[:2]) == ["1.png", "3.png"]
    assert len(hashed) == 2 + COUNT
    assert [ours != theirs for ours, theirs in zip(after, before, strict=True)] == [
        index in (1, 3) for index in range(COUNT)
    ]


def test_equal_size_and_time_do_not_hide_a_change(folder, tmp_path):
    """What a copy that keeps times looks like."""
    before = hashes(folder, tmp_path / "hashes.jsonl")
    file = folder / "2.txt"
    status = file.stat()
    file.write_text("picture 9")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes(folder, tmp_path / "hashes.jsonl")[2] != before[2]


@pytest.mark.parametrize("damage", [b'["a"', b"\xff\xfe", b'{"a": 1}\n', b'["a", "short"]', b"7\n[]\n"])
def test_a_file_that_a_kill_cut_short_costs_time_alone(folder, tmp_path, hashed, damage):
    file = tmp_path / "hashes.jsonl"
    before = hashes(folder, file)
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2] + damage)
    assert hashes(folder, file) == before
    hashed.clear()
    assert hashes(folder, file) == before
    assert len(hashed) == COUNT


def test_what_is_hashed_before_an_error_is_kept(folder, tmp_path, hashed):
    (folder / "4.png").unlink()
    source = FolderSource(folder)
    (folder / "3.png").unlink()
    known = KnownHashes(tmp_path / "hashes.jsonl")
    with pytest.raises(BadSample, match=r"^image: .*3\.png"), known.kept():  # noqa: PT012
        for index in range(4):
            known.content_hash(source, index)
    hashed.clear()
    again = KnownHashes(tmp_path / "hashes.jsonl")
    assert [again.content_hash(source, index) for index in range(3)]
    assert hashed == []


def test_several_may_add_to_one_file(folder, tmp_path, hashed):
    source = FolderSource(folder)
    several = [KnownHashes(tmp_path / "hashes.jsonl") for _ in range(COUNT)]
    for index, known in enumerate(several):
        with known.kept():
            known.content_hash(source, index)
    hashed.clear()
    known = KnownHashes(tmp_path / "hashes.jsonl")
    assert [known.content_hash(source, index) for index in range(COUNT)]
    assert hashed == []


def test_what_has_no_stamp_is_hashed_every_time(tmp_path):
    source = SceneSource(2)
    with KnownHashes(tmp_path / "hashes.jsonl").kept() as known:
        assert known.content_hash(source, 1) == source.content_hash(1)
    assert not (tmp_path / "hashes.jsonl").exists()
