"""TIFF files: damage is an error, libtiff's messages are not shown, and each reading is the same."""

import io
import os
import threading

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.refusals import refused

from nexus_adapters.conditions.images import decode_image
from nexus_adapters.errors import InvalidArgument

FAX = ("tiff_ccitt", "group3", "group4")
REPORTED_FAX = [
    pytest.param(name, marks=pytest.mark.skipif(cv2.__version__ < "5", reason="OpenCV 4 reports no damage"))
    for name in FAX
]
PIXELS = np.random.default_rng(0).random((40, 50)) > 0.5
WIDTH, LENGTH, ROWS, PHOTOMETRIC, ORIENTATION = 256, 257, 278, 262, 274


def tiff(compression, mode="1", **tags):
    stream = io.BytesIO()
    given = {globals()[name.upper()]: value for name, value in tags.items()}
    Image.fromarray(PIXELS).convert(mode).save(stream, "TIFF", compression=compression, tiffinfo=given)
    return stream.getvalue()


def retagged(content, **changes):
    """With other values of tags whose value is in the directory."""
    found = bytearray(content)
    with Image.open(io.BytesIO(content)) as image:
        start = image.tag_v2._offset
    for place in range(start + 2, start + 2 + 12 * int.from_bytes(found[start : start + 2], "little"), 12):
        tag = int.from_bytes(found[place : place + 2], "little")
        for name, value in changes.items():
            if tag == globals()[name.upper()]:
                found[place + 8 : place + 12] = value.to_bytes(4, "little")
    return bytes(found)


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("compression", [*FAX, "tiff_lzw", "tiff_deflate", "packbits", None])
@pytest.mark.parametrize(("photometric", "orientation"), [(0, 1), (1, 6), (0, 3)])
def test_whole_files_are_read_as_pillow_reads_them(compression, photometric, orientation, capfd):
    content = tiff(compression, photometric=photometric, orientation=orientation)
    assert np.array_equal(np.asarray(decode_image(content)), by_pillow(content))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", REPORTED_FAX)
def test_a_strip_that_ends_early_is_refused(compression, capfd):
    """Not filled up with whatever is in memory."""
    content = retagged(tiff(compression), length=90, rows=90)
    assert Image.open(io.BytesIO(content)).size == (50, 90)
    for _ in range(3):
        with refused("image", "corrupt"):
            decode_image(content)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("compression", [*REPORTED_FAX, "tiff_lzw", "tiff_deflate", "lzma"])
def test_damage_is_an_error_that_says_what_libtiff_says(compression, capfd):
    mode = "1" if compression in FAX else "RGB"
    content, refusals = tiff(compression, mode), []
    with Image.open(io.BytesIO(content)) as image:
        start, length = image.tag_v2[273][0], image.tag_v2[279][0]
    for place in range(start + length // 4, start + length, max(1, length // 8)):
        damaged = content[:place] + b"\xff\x00\xff" + content[place + 3 :]
        try:
            decode_image(damaged)
        except InvalidArgument as error:
            refusals.append(str(error.received))
    assert refusals
    assert all("corrupt" in each for each in refusals)
    assert capfd.readouterr().err == ""


def test_what_other_threads_write_meanwhile_is_not_lost(capfd):
    done = threading.Event()

    def talk():
        while not done.is_set():
            os.write(2, b"nexus train: step 3\n")

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        for _ in range(20):
            decode_image(tiff("group4"))
    finally:
        done.set()
        thread.join()
    lines = set(capfd.readouterr().err.splitlines())
    assert lines == {"nexus train: step 3"}


def test_many_threads_read_at_once(capfd):
    found = []
    read = [threading.Thread(target=lambda: found.append(decode_image(tiff("tiff_lzw")))) for _ in range(8)]
    for thread in read:
        thread.start()
    for thread in read:
        thread.join()
    assert len(found) == 8
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"
