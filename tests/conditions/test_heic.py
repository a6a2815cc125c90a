"""HEIC images: read where pillow-heif is installed, refused by name where it is not."""

import sys

import pytest
from tests.data.image_files import encoded, picture
from tests.refusals import refused

from nexus_adapters.conditions.images import image_endings, load_image
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import BadSample, read_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)  # the beginning of one, and nothing behind it


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr("nexus_adapters.conditions.images.find_spec", lambda name: None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(HEIC)
    (tmp_path / "b.png").write_bytes(encoded(picture()))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    return tmp_path


@pytest.mark.usefixtures("without")
def test_without_the_package_they_are_refused_with_what_to_install(folder):
    with refused("--image", "a.HEIC', a HEIC image", hint="pip install pillow-heif"):
        load_image(folder / "a.HEIC", argument="--image")
    with pytest.raises(BadSample, match=r"'a', a HEIC image\. Run pip install pillow-heif"):
        read_image(HEIC, "image", "a")
    with pytest.warns(UserWarning, match=r"HEIC images, which require pip install .*: 1 \(a\.HEIC\)"):
        assert len(FolderSource(folder)) == 1


def test_with_the_package_they_are_read(folder):
    pillow_heif = pytest.importorskip("pillow_heif")
    assert ".heic" in image_endings()
    pillow_heif.register_heif_opener()
    (folder / "a.HEIC").write_bytes(encoded(picture(), "HEIF", quality=90))
    source = FolderSource(folder)
    sample = source.load(0)
    assert (sample.captions, sample.image.mode) == (("a",), "RGB")
    assert sample.image.size == source.size(0) == (24, 16)
    (folder / "a.HEIC").write_bytes(HEIC)
    with pytest.raises(BadSample, match="corrupt"):
        source.load(0)
