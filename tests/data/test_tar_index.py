import io
import json
import os
import tarfile

import pytest
from tests.data.tar_files import members, tar
from tests.refusals import refused

from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.shards import LocalShard
from nexus_adapters.data.tar_index import (
    CAPTIONS,
    CONDITION,
    IMAGE,
    Layout,
    TarIndex,
    check_parts,
    find_index,
    group_members,
    index_tar,
)
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


def test_only_headers_are_read(tmp_path):
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


class CountingShard(LocalShard):
    """`opened`: how often, for an index."""

    opened = 0

    def open(self, version):
        self.opened += 1
        return super().open(version)


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(members(range(2))))
    shard, kept = CountingShard(str(path)), tmp_path / "kept"
    first = find_index(shard, shard.version(), kept)
    assert find_index(shard, shard.version(), kept) == first
    assert find_index(shard, None, kept) == first  # as of a server that does not answer
    assert shard.opened == 1
    path.write_bytes(tar(members(range(3))))
    assert len(find_index(shard, shard.version(), kept).members) == 9
    os.utime(path, ns=(1, 1))  # of the same size, but not the same
    find_index(shard, shard.version(), kept)
    assert shard.opened == 3
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
            UserWarning, match=r"^shards: '.*a\.tar' is truncated or damaged; its first \d+ files"
        ) as caught:
            find_index(shard, shard.version(), tmp_path)
        assert len(caught) == 1


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    (tmp_path / "file").touch()
    shard = LocalShard(str(tmp_path / "a.tar"))
    with refused("index_folder", f"'{tmp_path / 'file'}'"):
        find_index(shard, shard.version(), tmp_path / "file")


PLAIN = Layout.of(None, None, None)


def index(*names, is_whole=True):
    return TarIndex("", 0, is_whole, [(name, number * 1000, number) for number, name in enumerate(names)])


def grouped(*names, layout=PLAIN, is_whole=True):
    samples = group_members(index(*names, is_whole=is_whole), layout)
    parts = [
        [samples.place(row, part) for part in (IMAGE, CONDITION, CAPTIONS)]
        for row in range(len(samples.stems))
    ]
    return dict(zip(samples.stems, parts, strict=True))


def test_layouts():
    assert Layout(("jpg", "jpeg", "png", "webp"), None, "txt", None) == PLAIN
    assert Layout.of("PNG", ".canny.png", "json:text") == Layout(("png",), "canny.png", "json", "text")
    assert Layout.of(None, "png", "caption.txt") == Layout(
        ("jpg", "jpeg", "webp"), "png", "caption.txt", None
    )


def test_files_of_one_stem_are_a_sample():
    layout = Layout.of(None, "canny.png", None)
    assert grouped("a/0.jpg", "a/0.canny.png", "a/0.txt", "b/0.jpg", layout=layout) == {
        "a/0": [(0, 0), (1000, 1), (2000, 2)],
        "b/0": [(3000, 3), None, None],
    }
    apart = grouped("0.TXT", "1.txt", "v1.5/1.jpeg", "0.JPG", "0.png", "1.png")
    assert apart == {
        "0": [(3000, 3), None, (0, 0)],  # the jpg before the png
        "1": [(5000, 5), None, (1000, 1)],
        "v1.5/1": [(2000, 2), None, None],
    }


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        (["0.jpg", "0.seg.png", "0.txt"], ["0"]),
        (["0.seg.png", "0.depth.png", "0.jpg", "0.txt", "0.seg.txt"], ["0.seg", "0"]),
        (["a.1.jpg", "a.1.txt", "a.2.jpg", "a.2.txt"], ["a.1", "a.2"]),
        (["a.jpg", "a.txt", "a.1.jpg", "a.1.txt", "a.2.jpg"], ["a", "a.1"]),
        (["a.b.c.jpg", "a.b.c.txt", "a.b.d.jpg"], ["a.b.c", "a.b.d"]),  # the second lacks its captions
        (["v1.5.0.jpg", "v1.5.0.seg.png", "v1.5.0.txt"], ["v1.5.0"]),
        (["0.left.jpg", "0.right.jpg", "0.txt"], ["0"]),
        (["0.json"], ["0"]),
    ],
)
def test_longer_stems_are_samples_where_they_have_image_and_captions(names, samples):
    assert list(grouped(*names)) == samples


def test_maps_of_dotted_names():
    layout = Layout.of(None, "canny.png", None)
    names = [f"a.{number}.{end}" for number in range(2) for end in ("jpg", "canny.png", "txt")]
    assert grouped(*names, layout=layout) == {
        "a.0": [(0, 0), (1000, 1), (2000, 2)],
        "a.1": [(3000, 3), (4000, 4), (5000, 5)],
    }


def test_names_without_stem_or_extension_are_no_samples():
    assert grouped("README", "a/.hidden.jpg", ".DS_Store", "./._0.jpg", "./0.jpg") == {
        "./0": [(4000, 4), None, None]
    }


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["\u00e9.png", "e\u0301.txt"], "\u00e9"),
        (["e\u0301.png", "\u00e9.txt"], "e\u0301"),
        (["\u00e9/0.png", "e\u0301/0.txt"], "\u00e9/0"),
        (["./4.png", "4.txt"], "./4"),
        (["4.png", "./4.txt"], "4"),
        (["a/4.png", "./a//4.txt"], "a/4"),
        (["a.\u00e9.png", "a.e\u0301.txt"], "a.\u00e9"),
    ],
)
def test_names_in_several_spellings_are_one(names, stem):
    """The first one counts, as the user sees it."""
    assert grouped(*names) == {stem: [(0, 0), None, (1000, 1)]}


def test_extensions_in_several_spellings_are_one():
    layout = Layout.of(None, "e\u0301.png", None)
    assert grouped("0.\u00e9.png", "0.jpg", "0.txt", layout=layout) == {"0": [(1000, 1), (0, 0), (2000, 2)]}


def test_unsafe_names_are_names():
    assert list(grouped("/etc/0.jpg", "../../0.jpg", "C:\\0.jpg")) == ["/etc/0", "../../0", "C:\\0"]


def test_the_last_of_one_name_counts():
    assert grouped("0.jpg", "0.txt", "0.jpg") == {"0": [(2000, 2), None, (1000, 1)]}


def test_where_a_tar_ends_early_its_last_sample_is_there_if_it_is_whole():
    assert list(grouped("0.jpg", "0.txt", "1.jpg", is_whole=False)) == ["0"]
    assert list(grouped("0.jpg", "0.txt", "1.jpg", "1.txt", is_whole=False)) == ["0", "1"]
    assert list(grouped("0.jpg", "1.jpg", "1.txt", is_whole=False)) == ["0", "1"]
    assert grouped("0.jpg", is_whole=False) == grouped() == {}


@pytest.mark.parametrize(
    ("names", "layout", "argument", "received", "expected", "hint"),
    [
        ([], PLAIN, "shards", None, "samples, such as 00012.jpg with 00012.txt", ""),
        (["0.gif", "0.txt"], PLAIN, "image_column", "'jpg'", "(gif, txt)", ""),
        (["0.jpg", "0.json"], PLAIN, "caption_column", "'txt'", "(jpg, json)", ""),
        (
            ["0.jpg", "0.txt", "0.cany.png"],
            Layout.of(None, "canny.png", None),
            "condition_column",
            "'canny.png'",
            "cany.png",
            "Did you mean 'cany.png'?",
        ),
    ],
)
def test_missing_columns(names, layout, argument, received, expected, hint):
    with refused(argument, received, expected=expected, hint=hint):
        check_parts([group_members(index(*names), layout), group_members(index(), layout)], layout)


def test_one_shard_may_lack_what_another_has():
    check_parts([group_members(index(*names), PLAIN) for names in (["0.jpg"], ["0.txt"], [])], PLAIN)


def test_captions_of_texts_and_json():
    keyed = Layout.of(None, None, "json:text")
    assert PLAIN.read_captions(b" two\nlines \n", "a") == ("two\nlines",)
    assert keyed.read_captions(b'{"text": "a"}', "a") == ("a",)
    assert keyed.read_captions(b'{"text": ["a", ""]}', "a") == ("a", "")
    for bad in (b"{", b"[]", b"3", b'{"other": "a"}', b'{"text": 3}', b'{"text": []}', b"[" * 100_000):
        with pytest.raises(
            BadSample, match=r"^captions: expected a JSON object .* 'text', got something else in 'a'$"
        ):
            keyed.read_captions(bad, "a")
