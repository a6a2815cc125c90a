import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import DAMAGED, encoded, exif, picture
from tests.data.tar_files import members, tar
from tests.refusals import refused

from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.shards import LocalShard
from nexus_adapters.data.tars import FilePart, TarSource


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    with io.FileIO(path) as file:
        yield file


def test_it_is_all_of_a_file(file):
    part = FilePart(file, 10, 20)
    assert part.read() == bytes(range(10, 30))
    assert part.read(1) == b""
    assert part.seek(5) == 5
    assert part.read(3) == bytes([15, 16, 17])
    assert part.tell() == 8
    assert part.seek(-2, io.SEEK_END) == 18
    assert part.read(9) == bytes([28, 29])
    assert part.seek(-5, io.SEEK_CUR) == 15
    assert part.seek(50) == 50
    assert part.read(1) == b""
    assert part.readable()
    assert part.seekable()


def test_several_share_a_file_and_leave_it_open(file):
    a, b = io.BufferedReader(FilePart(file, 0, 5)), io.BufferedReader(FilePart(file, 90, 10))
    assert a.read(2) + b.read(2) + a.read(9) + b.read(1) == bytes([0, 1, 90, 91, 2, 3, 4, 92])
    del a, b
    assert not file.closed


def test_a_file_that_ends_within_it(file):
    assert FilePart(file, 95, 20).read() == bytes(range(95, 100))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a-000.tar").write_bytes(tar(members(range(4))))
    (tmp_path / "a-001.tar").write_bytes(tar(members(range(4, 7))))
    return tmp_path


def opened(folder, *patterns, **columns):
    return TarSource(
        [str(folder / name) for name in patterns or ["a-*.tar"]], index_folder=folder / "kept", **columns
    )


def test_samples_in_the_order_of_the_tars(folder):
    source = opened(folder, condition_column="canny.png")
    assert isinstance(source, Source)
    assert len(source) == 7
    assert [source.shard_of(index) for index in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    for index in range(7):
        sample = source.load(index)
        assert sample.key == source.key(index) == f"{folder}/a-00{index // 4}.tar/{index:05d}"
        assert np.array_equal(sample.image, picture(index))
        assert sample.condition is not None
        assert np.array_equal(sample.condition, picture(100 + index))
        assert sample.captions == (f"picture {index}",)
        assert source.size(index) == (24, 16)
    assert opened(folder).load(3).condition is None
    assert [len(opened(folder, pattern)) for pattern in ("a-{000..001}.tar", "a-001.tar")] == [7, 3]


def test_a_json_member_of_captions(folder):
    content = json.dumps({"texts": ["one", "two"], "width": 3}).encode()
    (folder / "j.tar").write_bytes(tar([("0.jpg", encoded(picture())), ("0.json", content)]))
    assert opened(folder, "j.tar", caption_column="json:texts").load(0).captions == ("one", "two")
    for column in ("json", "JSON", ".json"):
        with refused("caption_column", "'json'", expected="json:KEY", hint="texts, width"):
            opened(folder, "j.tar", caption_column=column)
    (folder / "t.tar").write_bytes(tar([("0.jpg", encoded(picture())), ("0.txt", content)]))
    with pytest.raises(BadSample, match="expected text, got a JSON object with texts, width"):
        opened(folder, "t.tar").load(0)


def test_images_without_captions(folder):
    given = [(name, content) for name, content in members(range(2)) if not name.endswith("txt")]
    (folder / "i.tar").write_bytes(tar(given))
    source = opened(folder, "i.tar", with_captions=False)
    assert [source.load(n).captions for n in range(2)] == [("",), ("",)]
    assert source.content_hash(0) != source.content_hash(1)


def test_dotted_names_are_samples_of_their_own(folder):
    names = [f"IMG.{year}.{day:02d}" for year in (2023, 2024) for day in range(6)]
    given = [(f"{n}.JPG", encoded(picture(i))) for i, n in enumerate(names)] + [
        (f"{n}.txt", n.encode()) for n in names
    ]
    (folder / "d.tar").write_bytes(tar(given))
    source = opened(folder, "d.tar")
    assert [source.load(n).captions[0] for n in range(len(source))] == names
    assert [source.key(n).rpartition("/")[2] for n in range(12)] == names
    assert np.array_equal(source.load(7).image, picture(7))


def test_what_a_tar_has_twice_or_without_captions_is_reported(folder):
    given = [("a.jpg", encoded(picture())), ("a.txt", b"a"), ("a.JPG", encoded(picture(1)))]
    given += [(f"a.{number}.jpg", b"") for number in range(4)]
    (folder / "c.tar").write_bytes(tar(given))
    with pytest.warns(UserWarning, match="ignored") as caught:
        source = opened(folder, "c.tar")
    assert len(caught) == 1
    assert "second images or captions of a sample: 4 (a.0.jpg, a.1.jpg, a.2.jpg, ...)" in source.ignored
    assert "members replaced by a later one with the same name: 1 (a.JPG)" in source.ignored
    assert np.array_equal(source.load(0).image, picture(1))


@pytest.mark.parametrize(
    ("names", "options", "left_out"),
    [
        (["a.jpg", "a.1.jpg", "b.jpg", "b.cut.jpg"], {"with_captions": False}, "2 (a.1.jpg, b.cut.jpg)"),
        (["a.jpg", "a.txt", "a.seg.png"], {}, "1 (a.seg.png)"),
        (["a.jpg", "a.txt", "a.long.txt"], {}, "1 (a.long.txt)"),
        (["a.jpg", "a.canny.png", "a.seg.png"], {"with_captions": False, "condition_column": "canny.png"},
         "1 (a.seg.png)"),
    ],
)  # fmt: skip
def test_what_a_sample_leaves_out_is_reported(folder, names, options, left_out):
    (folder / "e.tar").write_bytes(tar([(name, b"words") for name in names]))
    with pytest.warns(UserWarning, match="ignored"):
        source = opened(folder, "e.tar", **options)
    assert source.ignored == f"second images or captions of a sample: {left_out}"
    assert len(source) == len({name[0] for name in names})


def test_pipes_are_no_shards(folder):
    source = opened(folder)
    (folder / "a-001.tar").unlink()
    os.mkfifo(folder / "a-001.tar")
    with pytest.raises(OSError, match="not a regular file"):
        source.load(6)
    with refused("shards", "not a regular file"):
        opened(folder, "a-001.tar")


def test_sizes_are_upright(folder):
    turned = encoded(picture(), "JPEG", exif=exif(6))
    (folder / "r.tar").write_bytes(tar([("0.jpg", turned), ("0.txt", b"")]))
    source = opened(folder, "r.tar")
    assert source.size(0) == source.load(0).image.size == (16, 24)


def test_hashes_follow_each_part(folder):
    plain = [opened(folder).content_hash(index) for index in range(7)]
    mapped = [opened(folder, condition_column="canny.png").content_hash(index) for index in range(7)]
    assert len({*plain, *mapped}) == 14
    changed = [(name, b"other" if name == "00001.txt" else content) for name, content in members(range(4))]
    (folder / "a-000.tar").write_bytes(tar(changed))
    after = [opened(folder).content_hash(index) for index in range(7)]
    assert [index for index in range(7) if after[index] != plain[index]] == [1]


def test_stamps_follow_place_version_and_columns(folder):
    stamps = [opened(folder).stamp(index) for index in range(7)]
    assert len(set(stamps)) == 7
    assert [opened(folder).stamp(index) for index in range(7)] == stamps
    assert opened(folder, condition_column="canny.png").stamp(0) not in stamps
    (folder / "a-001.tar").write_bytes(tar(members(range(4, 8))))
    assert [opened(folder).stamp(index) == stamps[index] for index in range(7)] == 4 * [True] + 3 * [False]


def test_it_can_go_to_another_process(folder):
    source = opened(folder, condition_column="canny.png")
    other = pickle.loads(pickle.dumps(source))
    assert [other.content_hash(index) for index in range(7)] == [
        source.content_hash(index) for index in range(7)
    ]


def test_index_files_serve_the_next_run(folder):
    opened(folder)
    assert len(list((folder / "kept").glob("*.json"))) == 2
    for file in folder.glob("*.tar"):  # of the same size and time, but no tars any more
        status = file.stat()
        file.write_bytes(bytes(status.st_size))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(opened(folder)) == 7


@pytest.fixture
def reads(monkeypatch):
    """(offset, size) of whatever is read of any tar."""
    found = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            start = self.tell()
            content = super().read(size)
            found.append((start, len(content)))
            return content

        def readinto(self, buffer):
            start = self.tell()
            count = super().readinto(buffer)
            found.append((start, count))
            return count

    monkeypatch.setattr(LocalShard, "open", lambda shard, version: Counting(shard.place))
    return found


def test_a_run_that_resumes_reads_no_skipped_sample(folder, reads):
    large = [(f"{n:05d}.{kind}", bytes(200_000)) for n in range(6) for kind in ("jpg", "txt")]
    large[10] = ("00005.jpg", encoded(picture(5)))
    large[11] = ("00005.txt", b"the sixth")
    (folder / "large.tar").write_bytes(tar(large))
    opened(folder, "large.tar")
    assert sum(size for _, size in reads) < 50_000  # headers
    reads.clear()
    source = opened(folder, "large.tar")
    assert reads == []  # the index is kept
    assert source.load(5).captions == ("the sixth",)
    assert sorted(size for _, size in reads) == sorted([len(large[10][1]), len(b"the sixth")])
    first = 10 * (200_000 + 512)  # nothing before the sixth sample
    assert all(offset >= first for offset, _ in reads)


def test_a_size_reads_the_header_alone(folder, reads):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG")
    (folder / "n.tar").write_bytes(tar([("0.jpg", content), ("0.txt", b"")]))
    source = opened(folder, "n.tar")
    reads.clear()
    assert source.size(0) == (400, 400)
    assert sum(size for _, size in reads) < len(content) / 4


def test_bad_samples(folder):
    given = [
        *[(f"{n}.png", content) for n, content in enumerate(c for c in DAMAGED.values() if c is not None)],
        *[(f"{n}.txt", b"a caption") for n in range(len(DAMAGED) - 1)],
        ("no-image.txt", b"a caption"),
        ("no-caption.png", encoded(picture())),
        ("latin.png", encoded(picture())),
        ("latin.txt", b"caf\xe9"),
        ("evil\nname.png", b""),
        ("evil\nname.txt", b""),
    ]
    (folder / "bad.tar").write_bytes(tar(given))
    source = opened(folder, "bad.tar")
    assert len(source) == len(DAMAGED) - 1 + 4
    messages = []
    for index in range(len(source)):
        with pytest.raises(BadSample) as caught:
            source.load(index)
        messages.append(str(caught.value))
        assert source.key(index) in messages[-1]
        assert "\n" not in messages[-1]
    missing = f"image_column: '{folder}/bad.tar/no-image' has no file "
    assert messages[-4] == f"{missing}.jpg or .jpeg or .png or .webp"
    assert messages[-3].startswith("caption_column: ")
    assert messages[-3].endswith("has no file .txt")
    for read in (source.size, source.content_hash):
        with pytest.raises(BadSample, match="no-image' has no"):
            read(len(source) - 4)


def test_a_tar_that_ends_early_gives_its_whole_samples(folder):
    whole = (folder / "a-001.tar").read_bytes()
    (folder / "a-001.tar").write_bytes(whole[: whole.index(b"00006.txt")])
    with pytest.warns(UserWarning, match=r"a-001\.tar' is truncated") as caught:
        source = opened(folder, condition_column="canny.png")
    assert len(caught) == 1
    assert len(source) == 6
    assert source.load(5).captions == ("picture 5",)
    with pytest.warns(UserWarning, match="is truncated"):
        assert (
            len(opened(folder, caption_column="canny.png")) == 7
        )  # of which 00006 is whole, without its text


def test_a_tar_that_shrinks_meanwhile(folder):
    source = opened(folder)
    (folder / "a-001.tar").write_bytes((folder / "a-001.tar").read_bytes()[:600])
    assert source.load(0)
    with pytest.raises(BadSample, match=r"shards: expected \d+ bytes for '.*a-001\.tar/00006', got 0"):
        source.load(6)


def test_nothing_is_unpacked(folder, tmp_path):
    unsafe = [("../../escaped.jpg", encoded(picture())), ("../../escaped.txt", b"")]
    (folder / "u.tar").write_bytes(tar(unsafe))
    before = sorted(path for path in tmp_path.parent.rglob("*escaped*"))
    source = opened(folder, "u.tar")
    assert source.load(0).key == f"{folder}/u.tar/../../escaped"
    assert sorted(path for path in tmp_path.parent.rglob("*escaped*")) == before


def test_errors_at_opening(folder):
    (folder / "text.tar").write_text("text " * 1000)
    (folder / "empty.tar").write_bytes(tar([]))
    (folder / "file").touch()
    with refused("shards", f"'{folder / 'text.tar'}'", expected="an uncompressed tar"):
        opened(folder, "text.tar")
    with refused("shards", expected="samples"):
        opened(folder, "empty.tar")
    with refused("condition_column", "'cany.png'", expected="canny.png", hint="Did you mean"):
        opened(folder, condition_column="cany.png")
    with refused("keep_shards", 0, expected="at least 1"):
        opened(folder, keep_shards=0)
    with refused("index_folder", f"'{folder / 'file' / 'x'}'"):
        TarSource([str(folder / "a-000.tar")], index_folder=folder / "file" / "x")
    with pytest.raises(IndexError, match="index: expected 0 to 6, got 7"):
        opened(folder).load(7)
