import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from tests.prepare.sets import image as decoded

from nexus_adapters.prepare.shard_file import ShardFile, encode_image, encode_map, sample_members

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (NOISE, "RGB"),
        (np.repeat(NOISE[..., :1], 3, axis=2), "L"),
        (np.repeat((NOISE[..., :1] > 127) * np.uint8(255), 3, axis=2), "1"),
        (np.zeros_like(NOISE), "1"),
        (np.where(NOISE > 127, np.uint8(255), np.uint8(0)), "RGB"),
    ],
)
def test_a_map_read_back_is_the_map(pixels, mode):
    png = encode_map(Image.fromarray(pixels))
    assert np.array_equal(decoded(png), pixels)
    assert Image.open(io.BytesIO(png)).mode == mode
    assert encode_map(Image.fromarray(pixels)) == png


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_images_without_loss(image_format):
    assert np.array_equal(decoded(encode_image(Image.fromarray(NOISE), image_format)), NOISE)


def test_jpeg_keeps_colors_at_full_resolution():
    colors = np.zeros((16, 16, 3), np.uint8)
    colors[:, ::2] = (255, 0, 0)
    colors[:, 1::2] = (0, 0, 255)
    error = np.abs(np.asarray(decoded(encode_image(Image.fromarray(colors), "jpg")), int) - colors)
    assert error.max() < 20  # halved color resolution would mix the two


def test_members_of_a_sample():
    about = {"captions": ["eine Blüte", "世界"], "source": "a/b.jpg", "original_size": [3, 4]}
    members = dict(sample_members("000000007", ("jpg", b"image"), {"canny": b"c", "depth": b"d"}, about))
    assert list(members) == [
        "000000007.jpg", "000000007.canny.png", "000000007.depth.png", "000000007.json", "000000007.txt",
    ]  # fmt: skip
    assert json.loads(members["000000007.json"]) == about
    assert members["000000007.txt"].decode() == "eine Blüte"


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


def test_what_is_discarded_leaves_nothing(tmp_path):
    file = ShardFile(tmp_path / "a.tar", tmp_path)
    file.add("000.txt", b"hello")
    assert not (tmp_path / "a.tar").exists()
    file.discard()
    assert not list(tmp_path.iterdir())


def test_it_is_written_in_another_folder(tmp_path):
    (tmp_path / "aside").mkdir()
    file = ShardFile(tmp_path / "a.tar", tmp_path / "aside")
    file.add("000.txt", b"hello")
    assert [path.name for path in tmp_path.iterdir()] == ["aside"]
    file.finish()
    file.discard()  # which is too late
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "aside"]
