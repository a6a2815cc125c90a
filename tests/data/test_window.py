import io

import pytest

from nexus_adapters.data.window import Window


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    with io.FileIO(path) as file:
        yield file


def test_it_is_all_of_a_file(file):
    window = Window(file, 10, 20)
    assert window.read() == bytes(range(10, 30))
    assert window.read(1) == b""
    assert window.seek(5) == 5
    assert window.read(3) == bytes([15, 16, 17])
    assert window.tell() == 8
    assert window.seek(-2, io.SEEK_END) == 18
    assert window.read(9) == bytes([28, 29])
    assert window.seek(-5, io.SEEK_CUR) == 15
    assert window.seek(50) == 50
    assert window.read(1) == b""
    assert window.readable()
    assert window.seekable()


def test_several_share_a_file_and_leave_it_open(file):
    a, b = io.BufferedReader(Window(file, 0, 5)), io.BufferedReader(Window(file, 90, 10))
    assert a.read(2) + b.read(2) + a.read(9) + b.read(1) == bytes([0, 1, 90, 91, 2, 3, 4, 92])
    del a, b
    assert not file.closed


def test_a_file_that_ends_within_it(file):
    assert Window(file, 95, 20).read() == bytes(range(95, 100))
