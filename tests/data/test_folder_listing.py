import json

import pytest

from nexus_adapters.data.folder_listing import Listed, list_images, read_metadata


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "folder: expected a JSON object a line; received line 2 of '{}', which is no JSON"),
        ("[" * 100_000, "folder: expected a JSON object a line; received line 2 of '{}', which is no JSON"),
        ('["a.png"]', "folder: expected a JSON object a line; received line 2 of '{}', which is a list"),
        (
            {"file": "a.png", "text": "a", "edges": "m.png"},
            "image_column: expected a column of line 2 of '{}' (file, text, edges); received 'file_name'; "
            "did "
            "you mean 'file'?",
        ),
        ({"file_name": "a.png", "edges": "m.png"}, "(file_name, edges); received 'text'"),
        (
            {"file_name": "a.png", "text": "a"},
            "condition_column: expected a column of line 2 of '{}' (file_name",
        ),
        (
            GOOD_LINE | {"text": 3},
            "caption_column: expected a string or a list of at least one string; received 3",
        ),
        (GOOD_LINE | {"text": []}, "received [] as 'text' in line 2 of '{}'"),
        (GOOD_LINE | {"text": ["a", None]}, 'received ["a", null] as'),
        (GOOD_LINE | {"file_name": "/etc/a.png"}, "image_column: expected a path below the folder, relative"),
        (
            GOOD_LINE | {"file_name": "sub/../../a.png"},
            "received \"sub/../../a.png\" as 'file_name' in line 2",
        ),
        (GOOD_LINE | {"file_name": "C:\\a.png"}, "image_column: expected a path below the folder"),
        (GOOD_LINE | {"file_name": "..\\a.png"}, "image_column: expected a path below the folder"),
        (GOOD_LINE | {"file_name": ""}, "image_column: expected a path below the folder"),
        (GOOD_LINE | {"edges": "../m.png"}, "condition_column: expected a path below the folder"),
        (GOOD_LINE | {"edges": None}, "condition_column: expected a path below the folder"),
    ],
)
def test_each_bad_line_is_one_clear_error(tmp_path, line, message):
    folder = written(tmp_path, GOOD_LINE, line, GOOD_LINE)
    with pytest.raises(ValueError, match=r"^\w+: expected") as caught:
        read_metadata(folder, "file_name", "edges", "text")
    assert message.format(folder / "metadata.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"^folder: expected a metadata\.jsonl in UTF-8"):
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
