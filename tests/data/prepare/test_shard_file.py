import hashlib
import tarfile

from nexus_adapters.data.prepare.shard_file import ShardFile


def test_a_tar_of_no_time_and_no_owner(tmp_path):
    written = []
    for name in ("a", "b"):
        file = ShardFile(tmp_path / f"{name}.tar", tmp_path)
        file.add("000.txt", b"hello")
        file.add("001.txt", b"")
        size, sha256 = file.finish()
        content = (tmp_path / f"{name}.tar").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
        written.append(content)
    assert written[0] == written[1]
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, m.size, m.mtime, m.uid, m.uname) for m in tar] == [
            ("000.txt", 5, 0, 0, ""), ("001.txt", 0, 0, 0, ""),
        ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_what_is_abandoned_leaves_nothing(tmp_path):
    file = ShardFile(tmp_path / "a.tar", tmp_path)
    file.add("000.txt", b"hello")
    assert not (tmp_path / "a.tar").exists()
    file.abandon()
    assert not list(tmp_path.iterdir())


def test_it_is_written_in_another_folder(tmp_path):
    (tmp_path / "aside").mkdir()
    file = ShardFile(tmp_path / "a.tar", tmp_path / "aside")
    file.add("000.txt", b"hello")
    assert [path.name for path in tmp_path.iterdir()] == ["aside"]
    file.finish()
    file.abandon()  # of what is finished nothing is left to abandon
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "aside"]
