import json
import os
import pickle
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import GOOD, encoded, exif, picture
from tests.refusals import refused

from nexus_adapters.data.coco import CocoSource
from nexus_adapters.data.folder import FolderSource, list_images
from nexus_adapters.data.ignored import Ignored
from nexus_adapters.data.listing import list_files
from nexus_adapters.data.metadata import Columns, ListedSample
from nexus_adapters.data.metadata import read_metadata as read_metadata_file
from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.errors import InvalidArgument


def written(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def read_metadata(folder, *columns, **options):
    return read_metadata_file(folder / "metadata.jsonl", Columns(*columns), folder, **options)[0]


def test_lines_in_their_order(tmp_path):
    folder = written(
        tmp_path,
        {"file_name": "b.png", "text": "a bée", "edges": "maps/b.png"},
        "",
        {"file_name": "sub/a.png", "text": ["one", ""], "edges": "maps/a.png", "more": 3},
    )
    assert read_metadata(folder, "file_name", "edges", "text") == [
        ListedSample("b.png", "maps/b.png", ("a bée",)),
        ListedSample("sub/a.png", "maps/a.png", ("one", "")),
    ]
    assert read_metadata(folder, "file_name", None, "text")[0].condition is None


def test_a_null_is_one_image_without_a_caption(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    rows = [{"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": "None"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = FolderSource(tmp_path)
    with pytest.raises(BadSample, match="no caption in the metadata"):
        source.load(0)
    assert source.load(1).captions == ("None",)


GOOD_LINE = {"file_name": "a.png", "text": "a", "edges": "m.png"}


BELOW = "a path inside the folder"


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
    assert [item.image for item in list_images(list_files(tmp_path, Ignored()), Ignored())] == [
        "a.png",
        "b.JPG",
        "q.jp2",
        "sub/c.webp",
        "z.tif",
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "maps").mkdir()
    for number in range(3):
        if number:
            (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"maps/{number}.png").write_bytes(encoded(picture(10 + number)))
    (tmp_path / "3.jpg").write_bytes(encoded(picture(3), "JPEG", exif=exif(6)))
    rows = [
        {"file_name": name, "text": [f"the {name}", ""] if name == "1.png" else f"the {name}", "edges": maps}
        for name, maps in [
            ("2.png", "maps/2.png"),
            ("1.png", "maps/1.png"),
            ("gone.png", "maps/0.png"),
            ("3.jpg", "maps/gone.png"),
        ]
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_samples_as_listed(folder):
    source = FolderSource(folder, condition_column="edges")
    assert isinstance(source, Source)
    assert len(source) == 4
    sample = source.load(1)
    assert sample.key == source.key(1) == str(folder / "1.png")
    assert sample.captions == ("the 1.png", "")
    assert np.array_equal(sample.image, picture(1))
    assert sample.condition is not None
    assert np.array_equal(sample.condition, picture(11))
    assert FolderSource(str(folder)).load(0).condition is None


def test_sizes_are_upright(folder):
    source = FolderSource(folder)
    assert source.size(0) == (24, 16)
    assert source.size(3) == (16, 24) == source.load(3).image.size


def test_missing_files_are_found_when_they_are_read(folder):
    source = FolderSource(folder, condition_column="edges")
    for read in (source.load, source.size, source.content_hash):
        with pytest.raises(BadSample, match=r"gone\.png'"):
            read(2)
    with pytest.raises(BadSample, match=r"^condition: expected an image file, got '.*maps/gone\.png', which"):
        source.load(3)
    assert source.size(3) == (16, 24)


def test_hashes_follow_each_part(folder):
    def hashes(column="edges"):
        return [FolderSource(folder, condition_column=column).content_hash(index) for index in (0, 1)]

    before = hashes()
    assert before == hashes()
    assert before[0] != before[1]
    assert hashes(None) != before
    (folder / "maps/2.png").write_bytes(encoded(picture(99)))
    assert hashes()[0] != before[0]
    assert hashes()[1] == before[1]
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("the 1.png", "a 1.png"))
    assert hashes()[1] != before[1]


def test_stamps_follow_each_file(folder):
    source = FolderSource(folder, condition_column="edges")
    before = source.stamp(0)
    assert before == FolderSource(folder, condition_column="edges").stamp(0) != source.stamp(1)
    assert FolderSource(folder).stamp(0) != before
    Path(source.key(0)).touch()
    touched = source.stamp(0)
    assert touched != before
    (folder / "maps" / "2.png").touch()
    assert source.stamp(0) != touched
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("the 1.png", "a 1.png"))
    assert FolderSource(folder, condition_column="edges").stamp(1) != source.stamp(1)
    Path(source.key(0)).unlink()
    assert source.stamp(0) is None


def test_it_can_go_to_another_process(folder):
    source = FolderSource(folder, condition_column="edges")
    other = pickle.loads(pickle.dumps(source))
    assert len(other) == len(source)
    assert other.content_hash(0) == source.content_hash(0)
    assert np.array_equal(other.load(0).image, source.load(0).image)


def test_sizes_and_hashes_decode_no_pixels_and_loading_only_those_of_the_sample(folder):
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: whole.index(b"IDAT") + 8])
    source = FolderSource(folder, condition_column="edges")
    assert source.size(0) == (24, 16)
    assert source.content_hash(0)
    assert source.load(1)
    with pytest.raises(BadSample):
        source.load(0)


def test_texts_next_to_the_images(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "c.png"):
        (tmp_path / name).write_bytes(GOOD["grey.png"])
    (tmp_path / "b.txt").write_text("a grey picture\n")
    (tmp_path / "sub/a.txt").write_text("")
    source = FolderSource(tmp_path)
    assert [source.key(index) for index in range(3)] == [
        str(tmp_path / n) for n in ("b.png", "c.png", "sub/a.png")
    ]
    assert source.load(0).captions == ("a grey picture",)
    assert source.load(2).captions == ("",)
    for read in (source.load, source.content_hash):
        with pytest.raises(BadSample, match=r"^captions: '.*c\.png' has no '.*c\.txt'"):
            read(1)
    before = source.content_hash(0)
    (tmp_path / "b.txt").write_text("another text")
    assert source.content_hash(0) != before


def test_folders_that_are_none(tmp_path):
    with refused("folder", f"'{tmp_path / 'nowhere'}'"):
        FolderSource(tmp_path / "nowhere")
    with refused("folder", f"'{tmp_path}'", expected="metadata.jsonl, or images"):
        FolderSource(tmp_path)
    (tmp_path / "a.png").write_bytes(GOOD["grey.png"])
    with refused("folder", f"'{tmp_path}'", expected="metadata.jsonl, or images"):
        FolderSource(tmp_path)
    with refused("folder", f"'{tmp_path}', which has no metadata.jsonl", expected="columns"):
        FolderSource(tmp_path, condition_column="edges")
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with refused("folder", f"'{tmp_path}'", expected="samples in metadata.jsonl"):
        FolderSource(tmp_path)


def test_errors_come_before_any_image_is_opened(folder):
    for image in folder.glob("*.png"):
        image.unlink()
    with refused("caption_column", "'texts'", expected="a column", hint="Did you mean"):
        FolderSource(folder, caption_column="texts")
    FolderSource(folder)


def write(root, images, annotations):
    (root / "images").mkdir(exist_ok=True)
    file = root / "captions.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return file


@pytest.fixture
def coco(tmp_path):
    images = [{"id": number, "file_name": f"{number:012d}.png", "width": 24} for number in (9, 4, 700)]
    annotations = [
        {"id": 31, "image_id": 4, "caption": "second \n"},
        {"id": 30, "image_id": 4, "caption": "first"},
        {"id": 2, "image_id": 700, "caption": "missing"},
    ]
    file = write(tmp_path, images, annotations)
    for number in (4, 9):
        (tmp_path / "images" / f"{number:012d}.png").write_bytes(encoded(picture(number)))
    return CocoSource(file, tmp_path / "images")


def test_images_by_id_with_their_captions_by_id(coco):
    assert isinstance(coco, Source)
    assert len(coco) == 3
    assert [coco.key(index).rpartition("/")[2] for index in range(3)] == [
        "000000000004.png", "000000000009.png", "000000000700.png",
    ]  # fmt: skip
    sample = coco.load(0)
    assert np.array_equal(sample.image, picture(4))
    assert (sample.captions, sample.condition) == (("first", "second"), None)
    assert coco.size(0) == (24, 16)
    assert pickle.loads(pickle.dumps(coco)).load(0).captions == sample.captions


def test_an_image_without_captions_or_file_is_a_bad_sample(coco):
    with pytest.raises(BadSample, match=r"captions: '.*captions.json' has none for '.*009.png'"):
        coco.load(1)
    with pytest.raises(
        BadSample, match=r"image: expected an image file, got '.*700.png', which does not exist"
    ):
        coco.load(2)
    assert coco.stamp(2) is None


def test_hashes_and_stamps_follow_image_and_captions(coco, tmp_path):
    before = coco.content_hash(0), coco.stamp(0)
    assert before == (coco.content_hash(0), coco.stamp(0))
    (tmp_path / "images" / "000000000004.png").write_bytes(encoded(picture(5)))
    assert coco.content_hash(0) != before[0]
    assert coco.stamp(0) != before[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, ", which is not a file"),
        ("{", " (Expecting"),
        ("[]", " (list"),
        ('{"images": []}', ", in which 'annotations' is missing"),
        ('{"images": [], "annotations": []}', ", which lists no images"),
        ('{"images": [{"id": 1}], "annotations": []}', ", in which 'file_name' is missing"),
        (
            '{"images": [{"id": 1, "file_name": "x"}], '
            '"annotations": [{"id": 1, "image_id": 1, "caption": null}]}',
            " (None where text is expected)",
        ),
        (
            '{"images": [{"id": 1, "file_name": "../x.png"}], "annotations": []}',
            ", which lists '../x.png' outside the folder",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, reason):
    (tmp_path / "images").mkdir()
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    with refused("annotations", f"'{tmp_path / 'captions.json'}'{reason}"):
        CocoSource(tmp_path / "captions.json", tmp_path / "images")


def test_a_missing_folder_is_told(coco, tmp_path):
    with refused("images", f"'{tmp_path / 'nowhere'}'"):
        CocoSource(tmp_path / "captions.json", tmp_path / "nowhere")


def pictures(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(number)))
    return folder


def texts(folder, **captions):
    for name, caption in captions.items():
        (folder / name.replace("__", "/").replace("_", ".")).write_text(caption, encoding="utf-8")


def loaded(source):
    return {
        Path(source.key(n)).relative_to(source.folder).as_posix(): source.load(n).captions
        for n in range(len(source))
    }


def test_captions_in_files_of_other_cases_endings_and_unicode_forms(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "ü") for form in ("NFC", "NFD"))
    pictures(tmp_path, "a.png", "b.JPG.png", "c.png", f"{composed}.png", "d.png")
    texts(tmp_path, a_TXT="upper", c_caption="other")
    (tmp_path / "b.JPG.Txt").write_text("dots")
    (tmp_path / f"{decomposed}.txt").write_text("accents")
    (tmp_path / "d.txt").write_text("first")
    (tmp_path / "d.caption").write_text("second")
    with pytest.warns(UserWarning, match=r"second captions of an image: 1 \(d\.caption\)$"):
        source = FolderSource(tmp_path)
    assert loaded(source) == {
        "a.png": ("upper",),
        "b.JPG.png": ("dots",),
        "c.png": ("other",),
        "d.png": ("first",),
        f"{composed}.png": ("accents",),
    }


def test_linked_folders_and_images_are_read(tmp_path):
    pictures(tmp_path, "real/a.png", "elsewhere/b.png", "set/c.png")
    texts(tmp_path, real__a_txt="a", set__c_txt="c", set__link_txt="link")
    (tmp_path / "set/sub").symlink_to(tmp_path / "real")
    (tmp_path / "set/link.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "all").symlink_to(tmp_path / "set")
    expected = {"c.png": ("c",), "link.png": ("link",), "sub/a.png": ("a",)}
    assert loaded(FolderSource(tmp_path / "set")) == loaded(FolderSource(tmp_path / "all")) == expected


def test_metadata_as_csv_with_what_windows_writes(tmp_path):
    pictures(tmp_path, "sub/a.png", "ö.png", "maps/a.png")
    rows = 'file_name,text,edges\r\nsub\\a.png,"one, ""two""",maps\\a.png\r\no\u0308.png,,maps/a.png\r\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + rows, encoding="utf-8")
    source = FolderSource(tmp_path, condition_column="edges")
    assert loaded(source) == {"sub/a.png": ('one, "two"',), "ö.png": ("",)}
    assert np.array_equal(source.load(0).condition, picture(2))
    with refused("caption_column", "'texts'", expected="line 2", hint="Did you mean"):
        FolderSource(tmp_path, caption_column="texts")


@pytest.mark.parametrize(
    "rows", ["file_name,text\na.png\n", "file_name,text\na.png,b,c\n", "file_name,text\n"]
)
def test_a_table_with_gaps_is_refused(tmp_path, rows):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(rows)
    with pytest.raises(InvalidArgument):
        FolderSource(tmp_path)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("caption", ["x", "x, y"])
@pytest.mark.parametrize("columns", [{}, {"caption_column": "prompt"}])
def test_another_separator_than_a_comma_is_named(tmp_path, mark, caption, columns):
    """Also where the captions have commas, and the rows therefore more fields than the first line."""
    pictures(tmp_path, "a.png")
    rows = ["file_name;prompt", f"a.png;{caption}"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows).replace(";", mark))
    with refused("folder", "metadata.csv" if "," in caption else None, hint="commas"):
        FolderSource(tmp_path, **columns)


@pytest.mark.parametrize(("mark", "words"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "")])
def test_a_table_of_other_columns_is_reported_once(tmp_path, mark, words):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "metadata.csv").write_text("image,text\na.png,x\n".replace(",", mark))
    with pytest.warns(UserWarning, match="ignored"):
        source = FolderSource(tmp_path)
    hint = f", separated by {words} instead of commas" if words else ""
    assert source.ignored == f"metadata.csv without a column file_name{hint}: 1 (metadata.csv)"
    assert loaded(source) == {"a.png": ("a",)}


def test_images_are_read_without_their_maps_where_none_are_wanted(tmp_path):
    pictures(tmp_path, "images/a.png", "images/b.png", "conditioning/a.png", "conditioning/c.png")
    for name in "ab":
        (tmp_path / "images" / f"{name}.txt").write_text(name)
    with pytest.warns(UserWarning, match="ignored maps"):
        source = FolderSource(tmp_path, with_maps=False)
    assert loaded(source) == {"images/a.png": ("a",), "images/b.png": ("b",)}  # also b, which has no map
    assert all(source.load(index).condition is None for index in range(2))
    assert (
        source.ignored
        == "maps, which will be extracted from the images: 2 (conditioning/a.png, conditioning/c.png)"
    )


def test_metadata_of_subfolders(tmp_path):
    pictures(tmp_path, "x/a.png", "y/deep/b.png", "y/c.png", "d.png")
    row = {"file_name": "a.png", "text": "a"}
    (tmp_path / "x/metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / "y/metadata.csv").write_text("file_name,text\ndeep/b.png,b\n")
    with pytest.warns(
        UserWarning, match=r"ignored images not listed in the metadata: 2 \(d\.png, y/c\.png\)$"
    ):
        source = FolderSource(tmp_path)
    assert loaded(source) == {"x/a.png": ("a",), "y/deep/b.png": ("b",)}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x/a.png", "text": "root"}))
    with pytest.warns(UserWarning, match="rows for images listed in other metadata: 1"):
        assert loaded(FolderSource(tmp_path))["x/a.png"] == ("root",)
    (tmp_path / "x/metadata.jsonl").write_text(json.dumps(row | {"file_name": "../d.png"}))
    with refused("image_column", '"../d.png"', expected=BELOW, hint="allow_outside"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    "columns", [{}, {"condition_column": "edges"}, {"image_column": "photos", "condition_column": "edges"}]
)
def test_folders_of_images_and_maps_are_paired_by_name(tmp_path, columns):
    images, maps = columns.get("image_column", "images"), columns.get("condition_column", "conditioning")
    pictures(tmp_path, f"{images}/a.png", f"{images}/sub/b.png", f"{maps}/a.jpeg", f"{maps}/sub/b.png")
    (tmp_path / maps / "alone.png").write_bytes(encoded(picture(9)))
    pictures(tmp_path / images, "gone.png")
    for name in ("a", "sub/b", "gone"):
        (tmp_path / images / f"{name}.txt").write_text(name)
    pictures(tmp_path, f"{maps}/a.png", f"{images}/a.webp")  # a second map, and a second image of one map
    with pytest.warns(UserWarning) as caught:  # noqa: PT030  # each text is compared
        source = FolderSource(tmp_path, **columns)
    reports = [str(warning.message) for warning in caught]
    assert reports[-1].endswith(
        f"ignored second maps of an image: 1 ({maps}/a.png); maps without an image: 1 ({maps}/alone.png)"
    )
    assert len(reports) == (1 if columns else 2)  # a folder that no argument names is reported
    assert maps in reports[0]
    keys = [Path(source.key(index)).name for index in range(len(source))]
    assert keys == ["a.png", "a.webp", "gone.png", "b.png"]
    assert np.array_equal(source.load(0).condition, source.load(1).condition)
    assert np.array_equal(source.load(3).condition, picture(3))
    for read in (source.load, source.content_hash):  # the map is blamed, not the image
        with pytest.raises(BadSample, match=rf"^condition: .*'.*/{maps}/gone\.png'"):
            read(2)


def test_a_missing_map_is_blamed_itself(folder):
    source = FolderSource(folder, condition_column="edges")
    for read in (source.load, source.content_hash):
        with pytest.raises(BadSample, match=r"^condition: .*'.*maps/gone\.png'"):
            read(3)
        with pytest.raises(BadSample, match=r"^image: .*'.*/gone\.png'"):
            read(2)


def test_what_is_ignored_is_reported_once(tmp_path):
    pictures(tmp_path, "a.png", ".hidden.png")
    texts(tmp_path, a_txt="a", lonely_txt="b", notes_pdf="c", film_mp4="d")
    with pytest.warns(UserWarning, match="ignored") as caught:
        source = FolderSource(tmp_path)
    assert len(caught) == 1
    assert "files that are neither images nor captions: 2 (film.mp4, notes.pdf)" in str(caught[0].message)
    assert "captions without an image: 1 (lonely.txt)" in source.ignored


def test_images_without_captions_are_read_where_none_are_asked_for(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    texts(tmp_path, b_txt="not read")
    source = FolderSource(tmp_path, with_captions=False)
    assert loaded(source) == {"a.png": ("",), "b.png": ("",)}
    (tmp_path / "b.txt").unlink()
    with refused("folder", expected="captions", hint="--captions none"):
        FolderSource(tmp_path)


def test_json_objects_are_no_captions(tmp_path):
    pictures(tmp_path, "a.png")
    raw = json.dumps({"caption": "a cat", "score": 3})
    texts(tmp_path, a_txt=raw)
    with pytest.raises(BadSample, match="expected text, got a JSON object with caption, score"):
        FolderSource(tmp_path).load(0)
    for value in (raw, json.loads(raw), [raw]):
        written(tmp_path, {"file_name": "a.png", "text": value})
        with refused("caption_column", hint="text:"):
            FolderSource(tmp_path)
    for value in (raw, json.loads(raw)):
        written(tmp_path, {"file_name": "a.png", "text": value})
        assert loaded(FolderSource(tmp_path, caption_column="text:caption")) == {"a.png": ("a cat",)}
        with refused("caption_column", expected="'score'"):
            FolderSource(tmp_path, caption_column="text:score")
    written(tmp_path, {"file_name": "a.png", "text": "{a red|a blue} cat", "text:x": "{not json}"})
    assert loaded(FolderSource(tmp_path, caption_column="text:x")) == {"a.png": ("{not json}",)}


def test_texts_outside_the_folder_need_leave(tmp_path):
    pictures(tmp_path, "set/a.png", "other/b.png")
    texts(tmp_path, secret_txt="secret")
    (tmp_path / "set/a.txt").symlink_to(tmp_path / "secret.txt")
    with refused("folder", "set/a.txt", hint="allow_outside"):
        FolderSource(tmp_path / "set")
    assert loaded(FolderSource(tmp_path / "set", allow_outside=True)) == {"a.png": ("secret",)}
    rows = written(tmp_path, {"file_name": "a.png", "text": "x"}) / "metadata.jsonl"
    (tmp_path / "set/metadata.jsonl").symlink_to(rows)
    with refused("folder", "set/metadata.jsonl", hint="allow_outside"):
        FolderSource(tmp_path / "set")
    rows.write_text(json.dumps({"file_name": str(tmp_path / "other/b.png"), "text": "x"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert FolderSource(tmp_path / "set", allow_outside=True).load(0).captions == ("x",)


def test_pipes_and_devices_neither_hang_nor_fill_the_memory(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    texts(tmp_path, a_txt="a", b_txt="b")
    source = FolderSource(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.png").unlink()
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b.png")
    for read in (source.load, source.content_hash):
        with pytest.raises(BadSample, match=r"^captions: .*a\.txt'.*not a regular file"):
            read(0)
        with pytest.raises(BadSample, match=r"^image: .*b\.png'.*not a regular file"):
            read(1)
    with pytest.raises(BadSample):
        source.size(1)
    os.mkfifo(tmp_path / "metadata.jsonl")
    with refused("folder", hint="devices, pipes or sockets: 3 (a.txt, b.png, metadata.jsonl)"):
        FolderSource(tmp_path)


def test_coco_with_a_byte_order_mark_and_names_of_other_systems(coco, tmp_path):
    file = tmp_path / "captions.json"
    pictures(tmp_path / "images", "sub/é.png")
    images = [{"id": 1, "file_name": "sub\\e\u0301.png"}]
    content = {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
    file.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    source = CocoSource(file, tmp_path / "images")
    assert source.load(0).image.size == (24, 16)
    assert source.stamp(0)
    (tmp_path / "raw").mkdir()
    file.rename(tmp_path / "raw" / "captions.json")
    file.symlink_to("raw/captions.json")
    assert CocoSource(file, tmp_path / "images").load(0).captions == ("x",)
    (tmp_path / "images" / "captions.json").symlink_to("../raw/captions.json")
    with refused("annotations", "captions.json', a link to", hint="allow_outside"):
        CocoSource(tmp_path / "images" / "captions.json", tmp_path / "images")
    content["annotations"] = []
    file.write_text(json.dumps(content))
    assert CocoSource(file, tmp_path / "images", with_captions=False).load(0).captions == ("",)
