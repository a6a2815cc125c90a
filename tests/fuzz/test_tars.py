"""Damaged tars give the samples before the damage, or one error: never a hang, never a traceback."""

import io
import os
import random
import struct
import tarfile
import warnings

import pytest
from tests.data.image_files import encoded, picture
from tests.data.tar_files import tar

from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.tar_index import index_tar
from nexus_adapters.data.tars import TarSource
from nexus_adapters.errors import InvalidArgument

BLOCK = tarfile.BLOCKSIZE
FIELDS = [(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
NUMBERS = [-(2**86), -(2**63), -(2**20), -1536, -512, -1, 0, 1, 511, 10**6, 2**40, 2**62, 2**63, 2**64, 2**86]
KINDS = b"0127LKxgSX\0\xff"


def whole():
    """Tars with plain headers, and with GNU's and PAX's for long names; and their members."""
    members = []
    for number in range(4):
        members += [(f"{number}.png", encoded(picture(number, 8, 8))), (f"{number}.txt", b"words")]
    gnu = tar([*members, ("long/" * 30 + "4.png", members[0][1]), ("long/" * 30 + "4.txt", b"words")])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members[:4]:
            info = tarfile.TarInfo(name.replace("0.", "é" * 60 + "."))
            info.size, info.pax_headers = len(content), {"comment": "x" * 40}
            archive.addfile(info, io.BytesIO(content))
    whole = {}
    for content in (gnu, stream.getvalue()):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            whole[content] = [(m.name, m.offset_data, m.size) for m in archive]
    return whole


WHOLE = whole()


def number(value, width):
    """A number as tar writes it, also those that eight digits cannot hold."""
    if 0 <= value < 8 ** (width - 1):
        return f"{value:0{width - 1}o}\0".encode()
    value %= 256 ** (width - 1)
    return bytes([0xFF if value >> (8 * width - 9) else 0x80]) + value.to_bytes(width - 1, "big")


def with_checksum(content, start):
    """Made valid again, so that the damage is not found by the checksum."""
    header = content[start : start + BLOCK]
    if len(header) == BLOCK:
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[start : start + BLOCK] = header


def damaged(seed):
    """A damaged tar, and the first byte that differs."""
    draw = random.Random(seed)
    before = draw.choice(list(WHOLE))
    content = bytearray(before)
    for _ in range(draw.choice([1, 1, 1, 3])):
        headers = [at for at in range(0, len(content), BLOCK) if content[at + 257 : at + 262] == b"ustar"]
        start = draw.choice(headers or [0])
        kind = draw.randrange(7)
        if kind == 0:
            del content[draw.randrange(len(content)) :]
        elif kind == 1:
            for _ in range(draw.randrange(1, 20)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == 2:  # the size, the field that leads elsewhere
            content[start + 124 : start + 136] = number(draw.choice(NUMBERS), 12)
        elif kind == 3:
            at, width = draw.choice(FIELDS)
            content[start + at : start + at + width] = draw.randbytes(width)
        elif kind == 4:
            content[start + 156] = draw.choice(KINDS)
        elif kind == 5:
            other = draw.randrange(0, len(content), BLOCK)
            content[start : start + BLOCK] = content[other : other + BLOCK].ljust(BLOCK, b"\0")
        else:  # a PAX header that gives the size
            value = draw.choice(NUMBERS)
            record = next(f"{n} size={value}\n" for n in range(99) if len(f"{n} size={value}\n") == n)
            header = bytearray(tarfile.TarInfo("pax").tobuf(tarfile.USTAR_FORMAT))
            header[156:157], header[124:136] = draw.choice([b"x", b"g"]), number(len(record), 12)
            with_checksum(header, 0)
            content[start:start] = header + record.encode().ljust(BLOCK, b"\0")
        with_checksum(content, start)
        if len(content) < BLOCK:
            break
    common = os.path.commonprefix([before, bytes(content)])  # noqa: RUF071  # of bytes, not of paths
    return bytes(content), len(common)


class Counted(io.FileIO):
    """Ends a test that would read for ever."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        assert self.reads < 2000, "it reads without an end"
        assert 0 <= size <= 2**20, "it reads more than a header"
        return super().read(size)


def check(seed, folder):
    """The errors of the whole tar or of its samples; anything else is raised."""
    content, first = damaged(seed)
    file = folder / f"{seed}.tar"
    file.write_bytes(content)
    try:
        with Counted(file) as stream:
            index = index_tar(stream, "a.tar", "1")
    except InvalidArgument as error:
        return [error]
    places = [(offset, size) for _, offset, size in index.members]
    assert all(min(place) >= 0 and sum(place) <= len(content) for place in places)
    for before, members in WHOLE.items():  # the members that end before the damage are all there
        if before[:first] == content[:first]:
            intact = [member for member in members if member[1] + member[2] <= first]
            assert index.members[: len(intact)] == intact
    try:
        with warnings.catch_warnings(record=True) as reports:
            warnings.simplefilter("always")
            source = TarSource([str(file)], index_folder=folder / "kept")
    except InvalidArgument as error:
        return [error]
    assert len(reports) <= 3
    assert index.is_whole or reports
    errors = []
    for place in range(len(source)):
        try:
            sample = source.load(place)
            assert sample.image.size == (8, 8)
            assert source.content_hash(place)
        except BadSample as error:
            errors.append(error)
    return errors


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 6000), marks=pytest.mark.full)], ids=str
)
def test_damage_gives_the_samples_before_it_or_one_error(tmp_path, seeds):
    for seed in seeds:
        try:
            assert all("\n" not in str(error) for error in check(seed, tmp_path))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("size", NUMBERS[:6] + NUMBERS[-6:])
def test_sizes_that_no_member_has_end_the_index(tmp_path, size):
    content = bytearray(next(iter(WHOLE)))
    last = content.index(b"3.png")
    content[last + 124 : last + 136] = struct.pack("12s", number(size, 12))
    with_checksum(content, last)
    (tmp_path / "a.tar").write_bytes(content)
    with Counted(tmp_path / "a.tar") as stream:
        index = index_tar(stream, "a.tar", "1")
    assert [name for name, _, _ in index.members] == [
        f"{n}.{kind}" for n in range(3) for kind in ("png", "txt")
    ]
    assert not index.is_whole
    assert len(index.members) == len({offset for _, offset, _ in index.members})
