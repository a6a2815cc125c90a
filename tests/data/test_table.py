import json
import os
import pickle
import re
import sys

import datasets
import numpy as np
import pytest
from PIL import Image
from tests.data.image_files import DAMAGED, encoded, exif, picture
from tests.refusals import refused

from nexus_adapters.data.samples import BadSample, Source
from nexus_adapters.data.table import TableSource
from nexus_adapters.errors import MISSING, InvalidArgument


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


CONTENT = {
    "image": [{"bytes": encoded(picture(number)), "path": None} for number in range(3)],
    "edges": [{"bytes": encoded(picture(10 + number)), "path": None} for number in range(3)],
    "text": [f"picture {number}" for number in range(3)],
    "texts": [["one", "two"], ["three"], []],
    "number": [1, 2, 3],
}
IMAGE, TEXT = datasets.Image(), datasets.Value("string")
FEATURES = {
    "image": IMAGE,
    "edges": IMAGE,
    "text": TEXT,
    "texts": datasets.List(TEXT),
    "number": datasets.Value("int64"),
}


def made(content=None, features=None):
    return datasets.Dataset.from_dict(content or CONTENT, datasets.Features(features or FEATURES))


@pytest.fixture(params=["saved", "saved splits", "parquet", "image folder"])
def folder(request, tmp_path):
    """The same samples, in each kind of folder."""
    path = tmp_path / "set"
    if request.param == "saved":
        made().save_to_disk(path)
    elif request.param == "saved splits":
        datasets.DatasetDict({"train": made(), "test": made().select([0])}).save_to_disk(path)
    elif request.param == "parquet":
        path.mkdir()
        made().to_parquet(path / "train-00000.parquet")
    else:
        path.mkdir()
        rows = []
        for number in range(3):
            (path / f"{number}.png").write_bytes(CONTENT["image"][number]["bytes"])
            (path / f"edges-{number}.png").write_bytes(CONTENT["edges"][number]["bytes"])
            row = {"file_name": f"{number}.png", "edges_file_name": f"edges-{number}.png"}
            rows.append(
                json.dumps(row | {name: CONTENT[name][number] for name in ("text", "texts", "number")})
            )
        (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def test_each_kind_of_folder_gives_the_same(folder):
    source = TableSource(folder, condition_column="edges")
    assert isinstance(source, Source)
    assert len(source) == 3
    for index in range(3):
        sample = source.load(index)
        assert sample.key == source.key(index) == f"{folder}/train/{index}"
        assert np.array_equal(sample.image, picture(index))
        assert sample.condition is not None
        assert np.array_equal(sample.condition, picture(10 + index))
        assert sample.captions == (f"picture {index}",)
        assert source.size(index) == (24, 16)
    assert TableSource(folder).load(0).condition is None


def test_lists_of_captions(folder):
    source = TableSource(str(folder), caption_column="texts")
    assert source.load(0).captions == ("one", "two")
    for read in (source.load, source.content_hash):
        with pytest.raises(BadSample, match=rf"^texts: '{folder}/train/2' has no caption"):
            read(2)


def test_it_can_go_to_another_process(folder):
    source = TableSource(folder, condition_column="edges")
    other = pickle.loads(pickle.dumps(source))
    assert [other.content_hash(n) for n in range(3)] == [source.content_hash(n) for n in range(3)]


def test_hashes_follow_each_part(tmp_path):
    made().save_to_disk(tmp_path / "a")
    plain = [TableSource(tmp_path / "a").content_hash(index) for index in range(3)]
    mapped = [TableSource(tmp_path / "a", condition_column="edges").content_hash(index) for index in range(3)]
    assert len({*plain, *mapped}) == 6
    made(CONTENT | {"text": ["other", "picture 1", "picture 2"]}).save_to_disk(tmp_path / "b")
    assert [TableSource(tmp_path / "b").content_hash(index) == plain[index] for index in range(3)] == [
        0,
        1,
        1,
    ]


def test_sizes_and_hashes_decode_no_pixels_and_loading_only_those_of_the_sample(tmp_path):
    whole = CONTENT["image"][0]["bytes"]
    cut = {"bytes": whole[: whole.index(b"IDAT") + 8], "path": None}
    made(CONTENT | {"image": [cut, *CONTENT["image"][1:]]}).save_to_disk(tmp_path / "cut")
    source = TableSource(tmp_path / "cut", condition_column="edges")
    assert source.size(0) == (24, 16)
    assert source.content_hash(0)
    assert source.load(1)
    with pytest.raises(BadSample):
        source.load(0)


def test_columns_of_paths_bytes_and_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which is not the table's folder
    raw = [pair["bytes"] for pair in CONTENT["image"][:2]]
    content = {
        "paths": ["0.png", "sub\\1.png", "gone.png"],
        "raw": [*raw, None],
        "pair": [*CONTENT["image"][:2], None],
    }
    pair = {"bytes": datasets.Value("binary"), "path": TEXT}
    features = {"paths": TEXT, "raw": datasets.Value("binary"), "pair": pair, "text": TEXT}
    made(content | {"text": ["a", "b", "c"]}, features).save_to_disk(tmp_path / "set")
    (tmp_path / "set/sub").mkdir()
    for name, image in (("0.png", raw[0]), ("sub/1.png", raw[1])):
        (tmp_path / "set" / name).write_bytes(image)
    for column in ("paths", "raw", "pair"):
        source = TableSource("set", image_column=column)
        assert [np.array_equal(source.load(n).image, picture(n)) for n in range(2)] == [True, True]
        for read in (source.load, source.size, source.content_hash):
            with pytest.raises(BadSample, match=r".*: .*'.*set/train/2( \(gone\.png\))?'"):
                read(2)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_words_that_pandas_takes_for_nothing_are_captions(tmp_path, ending):
    words = ["NA", "null", "None", "nan", "a cat"]
    separator = "," if ending == "csv" else "\t"
    rows = [f"{number}.png{separator}{word}" for number, word in enumerate(words)]
    (tmp_path / f"list.{ending}").write_text("\n".join([f"file_name{separator}text", *rows]))
    for number in range(len(words)):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    source = TableSource(tmp_path / f"list.{ending}")
    assert [source.load(number).captions for number in range(len(words))] == [(word,) for word in words]


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_another_separator_than_a_comma_is_hinted_at(tmp_path, separator):
    (tmp_path / "t.csv").write_text(f"file_name{separator}text\na.png{separator}a\n")
    with refused("image_column", hint="with commas"):
        TableSource(tmp_path / "t.csv")


@pytest.mark.parametrize("mark", [",", "\t"])
@pytest.mark.parametrize(
    ("rows", "received"),
    [
        (["0.png,one, two"], "3 in line 2 of "),  # which pandas would read as the image "one"
        (["0.png,one", "", '1.png,"one, two",'], "3 in line 4 of "),
        (["0.png,one", "1.png"], "1 in line 3 of "),
    ],
)
def test_rows_with_other_fields_than_the_first_line(tmp_path, mark, rows, received):
    file = tmp_path / ("list.csv" if mark == "," else "list.tsv")
    file.write_text("\n".join(["file_name,text", *rows]).replace(",", mark))
    with refused(
        "path", f"{received}'{file}'", expected="(2)", hint="" if "1 in" in received else "quotation"
    ):
        TableSource(file)


def test_in_a_folder_rows_with_more_fields_than_the_first_line(tmp_path):
    (tmp_path / "data.csv").write_text("file_name,text\n0.png,one, two\n")
    with refused("path", f"'{tmp_path}'", expected="as many fields", hint="quotation"):
        TableSource(tmp_path)


LATIN = "file_name,text\n0.png,plain\n1.png,caf\u00e9\n"
LATIN_JSON = '{"file_name": "0.png", "text": "caf\u00e9"}\n'


@pytest.mark.parametrize(
    ("name", "content", "received", "hint"),
    [
        ("a.csv", LATIN.encode("latin-1"), "line 3 of ", "UTF-8"),
        ("a.tsv", LATIN.replace(",", "\t").encode("latin-1"), "line 3 of ", "UTF-8"),
        ("a.csv", LATIN.encode("utf-16"), "line 1 of ", "UTF-8"),
        ("a.jsonl", LATIN_JSON.encode("latin-1"), "line 1 of ", "UTF-8"),
        ("a.json", f"[{LATIN_JSON}]".encode("latin-1"), "line 1 of ", "UTF-8"),
        ("sub/a.csv", LATIN.encode("latin-1"), "UnicodeDecodeError", "UTF-8"),
        ("sub/a.jsonl", LATIN_JSON.encode("latin-1"), "UnicodeDecodeError", "UTF-8"),
        ("a.csv", b"", "empty", ""),
        ("a.tsv", b"file_name\ttext\n", "empty", ""),
        ("a.jsonl", b"\n \n", "empty", ""),
        ("a.parquet", b"", "0 bytes", ""),
        ("a.parquet", b"PAR1 and more", "corrupted", ""),
        ("a.csv", b'file_name,text\n0.png,"never ends', "inside string", ""),
        ("a.jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name":', "JSON parse error", ""),
        ("a.json", b'[{"file_name": "0.png"', "position 22", ""),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, name, content, received, hint):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    path = file if "/" not in name else file.parent
    with refused("path", received, hint=hint) as caught:
        TableSource(path)
    assert f"'{path}" in str(caught.value)
    assert "generating" not in str(caught.value)


def test_a_row_in_another_encoding_is_a_bad_sample(tmp_path):
    rows = '{"file_name": "0.png", "text": "plain"}\n' + LATIN_JSON.replace("0.png", "1.png")
    (tmp_path / "rows.jsonl").write_bytes(rows.encode("latin-1"))
    source = TableSource(tmp_path)
    for read in (source.load, source.size, source.content_hash, source.image_hash):
        with pytest.raises(BadSample, match=r"/train/1'.*UTF-8"):
            read(1)


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "list.parquet", "[set] 1/list.csv"])
def test_single_files_with_paths_next_to_them(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    rows = {"file_name": ["a.png", "gone.png"], "edges": ["e.png", "e.png"], "text": ["one", "two"]}
    table = datasets.Dataset.from_dict(rows)
    if file.suffix == ".parquet":
        table.to_parquet(file)
    elif file.suffix == ".jsonl":
        table.to_json(file)
    else:
        table.to_csv(file, sep="," if file.suffix == ".csv" else "\t", index=False)
    for number, image in enumerate(("a.png", "e.png")):
        (file.parent / image).write_bytes(encoded(picture(number)))
    source = TableSource(file, condition_column="edges")
    sample = source.load(0)
    assert np.array_equal(sample.image, picture(0))
    assert np.array_equal(sample.condition, picture(1))
    assert sample.captions == ("one",)
    for read in (source.load, source.content_hash):  # the image is blamed, by its name and the row's
        with pytest.raises(BadSample, match=r"^file_name: .*/train/1 \(gone\.png\)'"):
            read(1)


def test_paths_outside_the_folder_need_leave(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "a.png").write_bytes(CONTENT["image"][0]["bytes"])
    for path in (str(tmp_path / "a.png"), "../a.png", "sub/../../a.png"):
        made({"image": [path], "text": ["a"]}, {"image": TEXT, "text": TEXT}).to_csv(tmp_path / "set/t.csv")
        source = TableSource(tmp_path / "set/t.csv")
        for read in (source.load, source.size, source.content_hash):
            with pytest.raises(BadSample, match="allow_outside"):
                read(0)
        allowed = TableSource(tmp_path / "set/t.csv", allow_outside=True)
        if path != "sub/../../a.png":  # of which there is no sub
            assert allowed.load(0).image.size == (24, 16)


def test_pipes_are_no_tables(tmp_path):
    os.mkfifo(tmp_path / "train.parquet")
    for path in (tmp_path, tmp_path / "train.parquet"):
        with refused("path", "train.parquet'"):
            TableSource(path)


def test_folders_that_the_library_takes_for_a_pattern(tmp_path):
    (tmp_path / "set [1]").mkdir()
    made().to_parquet(tmp_path / "set [1]" / "train.parquet")
    with refused("path", "set [1]'", expected="[", hint="single file"):
        TableSource(tmp_path / "set [1]")
    assert len(TableSource(tmp_path / "set [1]" / "train.parquet")) == 3
    (tmp_path / "a.xml").touch()
    with refused("path", "a.xml'", expected=".parquet, .csv"):
        TableSource(tmp_path / "a.xml")


def test_captions_in_json(tmp_path):
    objects = [{"caption": f"picture {n}", "tags": ["x", "y"]} for n in range(3)]
    content = CONTENT | {"json": [json.dumps(each) for each in objects], "object": objects}
    table = datasets.Dataset.from_dict(content).cast_column("image", IMAGE).cast_column("edges", IMAGE)
    table.save_to_disk(tmp_path / "set")
    for column in ("json", "object"):
        assert TableSource(tmp_path / "set", caption_column=f"{column}:caption").load(1).captions == (
            "picture 1",
        )
        assert TableSource(tmp_path / "set", caption_column=f"{column}:tags").load(1).captions == ("x", "y")
        with refused(
            "caption_column",
            f"'{column}'" if column == "object" else "caption, tags",
            hint=f"{column}:caption",
        ):
            TableSource(tmp_path / "set", caption_column=column)
    with refused("caption_column", "'capt'", expected="caption, tags", hint="Did you mean"):
        TableSource(tmp_path / "set", caption_column="object:capt")
    with pytest.raises(BadSample, match="has no caption at 'capt'"):
        TableSource(tmp_path / "set", caption_column="json:capt").load(0)
    assert TableSource(tmp_path / "set", caption_column="gone", with_captions=False).load(0).captions == ("",)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_strings_and_lists_of_strings_in_one_column(tmp_path, ending):
    values = ["aa", ["b", "c"], None, []]

    def written(*values, name="text"):
        rows = [json.dumps({"file_name": "0.png", name: value}) for value in values]
        text = "\n".join(rows) if ending == "jsonl" else f"[{', '.join(rows)}]"
        (tmp_path / f"list.{ending}").write_text(text)
        return tmp_path / f"list.{ending}"

    (tmp_path / "0.png").write_bytes(encoded(picture()))
    for order in (1, -1):
        source = TableSource(written(*values[::order]))
        found = [source.load(index).captions for index in range(4)[::order][:2]]
        assert found == [("aa",), ("b", "c")]
        for index in range(4)[::order][2:]:
            with pytest.raises(BadSample, match="has no caption"):
                source.load(index)
    objects = [{"en": value} for value in values]
    source = TableSource(written(*objects), caption_column="text:en")
    assert [source.load(index).captions for index in range(2)] == [("aa",), ("b", "c")]
    for wrong in (3, ["b", 3]):
        with refused("caption_column", f"{json.dumps(wrong)} as 'text' in row 2"):
            TableSource(written("aa", wrong, ["b"]))
    with refused("caption_column", "in row 2", hint="text:en"):
        TableSource(written("aa", {"en": "b"}))


def test_other_columns_are_left_alone(tmp_path):
    damaged = [{"bytes": DAMAGED["random.jpg"], "path": None}] * 3
    made(CONTENT | {"depth": damaged}, FEATURES | {"depth": IMAGE}).save_to_disk(tmp_path / "set")
    source = TableSource(tmp_path / "set")
    assert source.load(1).captions == ("picture 1",)
    assert source.size(1) == (24, 16)


def test_damage_and_turning(tmp_path):
    contents = [*(c for c in DAMAGED.values() if c is not None), encoded(picture(), "JPEG", exif=exif(6))]
    rows = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "text": ["a"] * len(contents),
    }
    made(rows, {"image": IMAGE, "text": TEXT}).save_to_disk(tmp_path / "set")
    source = TableSource(tmp_path / "set")
    for index in range(len(source) - 1):
        with pytest.raises(BadSample, match=rf"^image: .*'{tmp_path}/set/train/{index}'"):
            source.load(index)
    assert source.size(len(source) - 1) == source.load(len(source) - 1).image.size == (16, 24)


def test_one_split_of_several(tmp_path):
    datasets.DatasetDict({"train": made(), "test": made().select([2])}).save_to_disk(tmp_path / "set")
    assert TableSource(tmp_path / "set", split="test").load(0).captions == ("picture 2",)
    with refused("split", "'val'", expected="train, test"):
        TableSource(tmp_path / "set", split="val")
    (tmp_path / "files").mkdir()
    made().to_parquet(tmp_path / "files" / "train.parquet")
    assert len(TableSource(tmp_path / "files", split="train[:2]")) == 2
    with pytest.raises(InvalidArgument) as caught:
        TableSource(tmp_path / "files", split="val")
    assert caught.value.name == "path"
    assert "split 'val'" in caught.value.expected
    assert str(caught.value.received).startswith(f"'{tmp_path / 'files'}' (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "expected", "hint"),
    [
        (
            {"image_column": "imag"},
            "(image, edges, text, ",
            "Did you mean 'image'?",
        ),
        ({"condition_column": "edge"}, "(image, edges, text, ", "Did you mean 'edges'?"),
        ({"caption_column": "caption"}, "set' (image, edges, text, ", ""),
        ({"caption_column": "number"}, "strings or lists of strings", ""),
        ({"caption_column": "image"}, "strings or lists of strings", ""),
        ({"image_column": "number"}, "images, paths or bytes", ""),
        ({"condition_column": "texts"}, "images, paths or bytes", ""),
    ],
)
def test_wrong_columns(tmp_path, columns, expected, hint):
    made().save_to_disk(tmp_path / "set")
    with pytest.raises(InvalidArgument) as caught:
        TableSource(tmp_path / "set", **columns)
    ((name, column),) = columns.items()
    assert (caught.value.name, caught.value.hint) == (name, hint)
    assert str(caught.value.received).startswith(f"'{column}'")
    assert expected in caught.value.expected
    assert "\n" not in str(caught.value)


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    made().select([]).to_parquet(tmp_path / "none" / "train.parquet")
    made().save_to_disk(tmp_path / "set")
    for path, reason in [
        (tmp_path / "empty", ".+"),
        (tmp_path / "nowhere", ".+"),
        ("nobody/no-such-set", ".+"),
        (tmp_path / "none", "ValueError: .*no data!"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            TableSource(path)
        assert caught.value.name == "path"
        assert "split 'train'" in caught.value.expected
        assert re.fullmatch(rf"'{path}' \({reason}\)", str(caught.value.received))
        assert "\n" not in str(caught.value)
    with refused("revision", "'main'", expected=f"'{tmp_path / 'set'}'"):
        TableSource(tmp_path / "set", revision="main")


def test_one_configuration_of_several(tmp_path):
    configs = ["configs:"]
    for name, count in (("small", 1), ("large", 3)):
        (tmp_path / name).mkdir()
        made().select(range(count)).to_parquet(tmp_path / name / "train.parquet")
        configs += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "README.md").write_text("\n".join(["---", *configs, "---\n"]))
    assert [len(TableSource(tmp_path, config_name=name)) for name in ("small", "large")] == [1, 3]
    with pytest.raises(InvalidArgument) as caught:
        TableSource(tmp_path)
    assert caught.value.name == "path"
    assert re.search("small.*large", str(caught.value.received))
    made().save_to_disk(tmp_path / "set")
    with refused("config_name", "'small'", expected=f"saved table '{tmp_path / 'set'}'"):
        TableSource(tmp_path / "set", config_name="small")


def test_the_hub_is_asked_for_config_split_and_revision(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return made()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = TableSource("me/set", split="train[:1]", revision="v2", config_name="small")
    assert asked == [("me/set", {"name": "small", "split": "train[:1]", "revision": "v2"})]
    assert source.key(0) == "me/set/train[:1]/0"
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made().select([]))
    with refused("path", "'me/set', which is empty"):
        TableSource("me/set")


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("the package datasets", MISSING, hint="pip install datasets"):
        TableSource(tmp_path)


def test_pictures_made_by_the_library_itself(tmp_path):
    """As people make them: from PIL images, without bytes of their own."""
    table = datasets.Dataset.from_dict({"image": [Image.new("L", (6, 4), 9)], "text": ["grey"]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    assert TableSource(tmp_path / "set").load(0).image.getpixel((0, 0)) == (9, 9, 9)


def test_a_link_to_a_folder_is_read_as_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    rows = []
    for number in range(2):
        (tmp_path / "real" / f"{number}.png").write_bytes(encoded(picture(number)))
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (tmp_path / "real" / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "outside.png").write_bytes(encoded(picture(9)))
    (tmp_path / "real" / "rows.jsonl").write_text(
        "\n".join([*rows, json.dumps({"file_name": str(tmp_path / "outside.png"), "text": ""})])
    )
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    (tmp_path / "again").symlink_to("link", target_is_directory=True)
    for name in ("real", "link", "again"):
        source = TableSource(tmp_path / name)
        assert [source.load(index).captions for index in range(2)] == [("picture 0",), ("picture 1",)]
        listed = TableSource(tmp_path / name / "rows.jsonl")
        assert listed.image_hash(1) == source.image_hash(1)
        with pytest.raises(BadSample, match="in the table's folder"):
            listed.load(2)
