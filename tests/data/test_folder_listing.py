import json

import pytest
from tests.refusals import refused

from nexus_adapters.data.folder_listing import Listed, list_images, read_metadata
from nexus_adapters.errors import InvalidArgument


def written(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_lines_in_their_order(tmp_path):
    folder = written(
        tmp_path,
        {"file_name": "b.png", "text": "a bée", "edges": "maps/b.png"},
        "",
        {"file_name": "sub/a.png", "text": ["one", ""], "edges": "maps/a.png", "more": 3},
    )
    assert read_metadata(folder, "file_name", "edges", "text") == [
        Listed("b.png", "maps/b.png", ("a bée",)),
        Listed("sub/a.png", "maps/a.png", ("one", "")),
    ]
    assert read_metadata(folder, "file_name", None, "text")[0].condition is None


GOOD_LINE = {"file_name": "a.png", "text": "a", "edges": "m.png"}


BELOW = "a path below the folder"


@pytest.mark.parametrize(
    ("line", "name", "received", "expected"),
    [
        ("{", "folder", "line 2 of '{}', which is not JSON", "a JSON object per line"),
        ("[" * 100_000, "folder", "line 2 of '{}', which is not JSON", "a JSON object per line"),
        ('["a.png"]', "folder", "line 2 of '{}', which is a list", "a JSON object per line"),
        (
            {"file": "a.png", "text": "a", "edges": "m.png"},
            "image_column",
            "'file_name'",
            "a column of line 2 of '{}' (file, text, edges)",
        ),
        ({"file_name": "a.png", "edges": "m.png"}, "caption_column", "'text'", "(file_name, edges)"),
        ({"file_name": "a.png", "text": "a"}, "condition_column", "'edges'", "line 2 of '{}' (file_name"),
        (GOOD_LINE | {"text": 3}, "caption_column", "3 as 'text'", "a list of at least one string"),
        (GOOD_LINE | {"text": []}, "caption_column", "[] as 'text' in line 2 of '{}'", ""),
        (GOOD_LINE | {"text": ["a", None]}, "caption_column", '["a", null] as', ""),
        (GOOD_LINE | {"file_name": "/etc/a.png"}, "image_column", '"/etc/a.png"', BELOW),
        (
            GOOD_LINE | {"file_name": "sub/../../a.png"},
            "image_column",
            "\"sub/../../a.png\" as 'file_name' in line 2",
            BELOW,
        ),
        (GOOD_LINE | {"file_name": "C:\\a.png"}, "image_column", '"C:\\\\a.png"', BELOW),
        (GOOD_LINE | {"file_name": "..\\a.png"}, "image_column", '"..\\\\a.png"', BELOW),
        (GOOD_LINE | {"file_name": ""}, "image_column", '""', BELOW),
        (GOOD_LINE | {"edges": "../m.png"}, "condition_column", '"../m.png"', BELOW),
        (GOOD_LINE | {"edges": None}, "condition_column", "null", BELOW),
    ],
)
def test_each_bad_line_is_one_clear_error(tmp_path, line, name, received, expected):
    folder = written(tmp_path, GOOD_LINE, line, GOOD_LINE)
    with pytest.raises(InvalidArgument) as caught:
        read_metadata(folder, "file_name", "edges", "text")
    assert caught.value.name == name
    assert received.replace("{}", f"{folder / 'metadata.jsonl'}") in str(caught.value.received)
    assert expected.replace("{}", f"{folder / 'metadata.jsonl'}") in caught.value.expected
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    with refused("folder", f"'{tmp_path / 'metadata.jsonl'}'", expected="UTF-8"):
        read_metadata(tmp_path, "file_name", None, "text")


def test_images_are_listed_sorted_whatever_their_case(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in [
        "b.JPG",
        "a.png",
        "sub/c.webp",
        "z.tif",
        "q.jp2",
        "notes.txt",
        "._a.png",
        ".cache/d.png",
        "e.psd",
    ]:
        (tmp_path / name).touch()
    assert [item.image for item in list_images(tmp_path)] == [
        "a.png",
        "b.JPG",
        "q.jp2",
        "sub/c.webp",
        "z.tif",
    ]
