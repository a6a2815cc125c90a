import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from tests.data.image_files import DAMAGED, GOOD, encoded, exif, picture, png_with_a_chunk_at_the_end

from nexus_adapters.data.samples import (
    BadSample,
    Part,
    Source,
    as_captions,
    captions_at,
    hash_image,
    hash_sample,
    json_keys,
    no_column,
    read_image,
    read_size,
    read_text,
    split_column,
)


def test_a_missing_column_lists_what_is_there_and_the_nearest():
    error = no_column("caption_column", "captoin", ["file_name", "caption"], "'photos'")
    assert error.name == "caption_column"
    assert error.expected == "a column of 'photos' (file_name, caption)"
    assert error.received == "'captoin'"
    assert error.hint == "Did you mean 'caption'?"
    assert no_column("image_column", "zzz", ["text"], "'a'").hint == ""
    assert "(none)" in no_column("image_column", "zzz", [], "'a'").expected


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", ""], ("a", "")),
        ([], None),
        (None, None),
        (3, None),
        (["a", 1], None),
    ],
)
def test_captions(value, captions):
    assert as_captions(value) == captions


def test_a_bad_sample_comes_back_from_another_process_as_it_was():
    error = pickle.loads(pickle.dumps(BadSample("image: expected a readable image, got 'a'")))
    assert type(error) is BadSample
    assert str(error) == "image: expected a readable image, got 'a'"
    with pytest.raises(ValueError, match="got 'a'"):
        raise error


def test_what_lacks_a_method_is_no_source():
    assert not isinstance([1, 2], Source)


@pytest.mark.parametrize("name", GOOD)
def test_every_good_kind_is_read_and_its_header_tells_the_size(name):
    image = read_image(GOOD[name], "image", name)
    assert image.mode == "RGB"
    assert read_size(GOOD[name], "image", name) == image.size
    assert image.size == ((16, 24) if name == "rotated.jpg" else (24, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_header_tells_the_size_in_every_orientation(kind, orientation):
    try:
        content = encoded(picture(), kind, exif=exif(orientation))
    except (KeyError, OSError) as error:  # this Pillow was built without it
        pytest.skip(f"Pillow cannot write {kind}: {error}")
    assert read_size(content, "image", "a") == read_image(content, "image", "a").size
    assert read_size(content, "image", "a") == ((16, 24) if orientation >= 5 else (24, 16))


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>'


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_orientation_behind_the_pixels_of_a_png_counts(orientation):
    as_exif = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    for kind, body in [(b"eXIf", as_exif), (b"iTXt", XMP % orientation)]:
        content = png_with_a_chunk_at_the_end(kind, body)
        assert read_image(content, "image", "a").size == read_size(content, "image", "a")
        assert read_size(content, "image", "a") == ((16, 24) if orientation == 6 else (24, 16))


def test_other_text_behind_the_pixels_of_a_png_decodes_none(monkeypatch):
    """Common programs write the date there."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    content = png_with_a_chunk_at_the_end(b"tEXt", b"date:create\x002026-01-01")
    assert read_size(content, "image", "a") == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_size_decodes_no_pixels(monkeypatch, kind):
    def refuse(_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    content = encoded(picture(), kind, exif=exif(8))
    assert read_size(content, "image", "a") == (16, 24)
    with pytest.raises(BadSample, match="decoded"):
        read_image(content, "image", "a")


def test_files_bytes_and_readers_give_the_same(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(GOOD["rotated.jpg"])
    expected = np.asarray(read_image(path, "image", "a"))
    with path.open("rb") as reader:
        assert np.array_equal(read_image(reader, "image", "a"), expected)
        assert read_size(reader, "image", "a") == (16, 24)
    assert np.array_equal(read_image(path.read_bytes(), "image", "a"), expected)


@pytest.mark.parametrize("name", [name for name, content in DAMAGED.items() if content is not None])
def test_every_kind_of_damage_is_a_bad_sample_in_one_line(name):
    with pytest.raises(BadSample, match=rf"^part: expected .*, got 'shard/{name}'") as caught:
        read_image(DAMAGED[name], "part", f"shard/{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "bomb.png", "too-large.png", "random.jpg"])
def test_what_no_header_is_has_no_size(name):
    with pytest.raises(BadSample, match=rf"^image: expected .*, got '{name}'"):
        read_size(DAMAGED[name], "image", name)


def test_the_syntax_error_is_one():
    with pytest.raises(SyntaxError), Image.open(io.BytesIO(DAMAGED["syntax-error.png"])) as image:
        image.load()


def test_missing_files(tmp_path):
    for read in (read_image, read_size, read_text):
        with pytest.raises(BadSample, match=r"^part: expected .*, got 'gone'"):
            read(tmp_path / "gone.png", "part", "gone")
    with pytest.raises(BadSample, match=r"got 'gone' \(No such file or directory\)"):
        hash_sample([Part("image", tmp_path / "gone.png", "gone")], ["a"])


def test_what_a_file_system_raises_is_a_bad_sample(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(GOOD["grey.png"])

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadSample, match="Permission denied"):
        read_image(tmp_path / "a.png", "image", "a")
    monkeypatch.setattr("nexus_adapters.files.open_regular", refuse)
    with pytest.raises(BadSample, match=r"condition: .* readable file, got 'b' \(Permission denied\)"):
        hash_sample([Part("image", b"", "a"), Part("condition", tmp_path / "a.png", "b")], [])


def test_text_is_utf_8():
    assert read_text("\ufeff a café \n".encode(), "captions", "a") == "a café"
    with pytest.raises(BadSample, match=r"^captions: expected text in UTF-8, got 'a'"):
        read_text("café".encode("latin-1"), "captions", "a")


def test_hashes_tell_everything_apart(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"image")
    given = [
        ([b"image"], ["text"]),
        ([b"imagE"], ["text"]),
        ([b"image", b"map"], ["text"]),
        ([b"map", b"image"], ["text"]),
        ([b"image"], ["te", "xt"]),
        ([b"image"], ["text", ""]),
    ]
    hashes = [
        hash_sample([Part("image", content, "a") for content in contents], captions)
        for contents, captions in given
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_sample([Part("image", path, "a")], ["text"]) == hashes[0]
    assert hash_sample([Part("image", path, "a"), Part("condition", None, "none")], ["text"]) == hashes[0]
    assert hash_image(path, "a") == hash_image(b"image", "another name") != hash_image(b"imagE", "a")
    assert all(len(bytes.fromhex(digest)) == 32 for digest in hashes)


def test_captions_at_a_key_of_json():
    assert split_column("json:caption", ["json", "text"]) == ("json", "caption")
    assert split_column("a:b", ["a:b"]) == ("a:b", None)
    assert split_column("text", []) == ("text", None)
    for value in ({"a": "b", "c": ["d", "e"]}, '{"a": "b", "c": ["d", "e"]}'):
        assert (captions_at(value, "a"), captions_at(value, "c"), captions_at(value, "x")) == (
            ("b",),
            ("d", "e"),
            None,
        )
    for value in ("{", "[]", 3, None, "[" * 100_000):
        assert captions_at(value, "a") is None
    assert json_keys(["words", ' {"a": 1, "b": 2}\n']) == ["a", "b"]
    assert json_keys(["{a cat}", "{}", "[1]", "{" * 9, '"a"']) == []
