import json

import datasets
import pytest
from PIL import Image
from tests.data.image_files import picture
from tests.data.tar_files import members, tar
from tests.prepare.sets import digests, make, samples, write_folder
from tests.refusals import refused

from nexus_adapters.data.coco import CocoSource
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.table import TableSource
from nexus_adapters.data.tars import TarSource
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.errors import MISSING
from nexus_adapters.prepare.filters import Filters
from nexus_adapters.prepare.plan import Plan
from nexus_adapters.prepare.source_kinds import SourceOptions, find_kind, open_source, source_settings


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    write_folder(root / "folder", 3)
    (root / "tars").mkdir()
    (root / "tars" / "0.tar").write_bytes(tar(members(range(3))))
    rows = {"image": [picture(n) for n in range(3)], "text": ["a", "b", "c"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(root / "saved")
    (root / "parquet").mkdir()
    table.to_parquet(root / "parquet" / "train.parquet")
    coco = root / "coco"
    write_folder(coco / "train2017", 3)
    write_folder(coco / "val2017", 2)
    (coco / "annotations").mkdir()
    for split, count in (("train2017", 3), ("val2017", 2)):
        content = {
            "images": [{"id": n, "file_name": f"{n:03d}.png"} for n in range(count)],
            "annotations": [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in range(count)],
        }
        (coco / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    (root / "urls.txt").write_text("https://example.com/a.jpg\n")
    (root / "urls.csv").write_text("URL,TEXT\nhttps://example.com/a.jpg,a\n")
    (root / "urls.json").write_text('[{"url": "x", "caption": "a"}]')
    datasets.Dataset.from_dict({"url": ["x"], "caption": ["a"]}).to_parquet(root / "urls.parquet")
    listed = root / "listed"
    write_folder(listed, 3)
    rows = [f"{n:03d}.png,{'abc'[n]}" for n in range(3)]
    (listed / "list.csv").write_text("\n".join(["file_name,text", *rows]))
    (root / "tars [v1] {1..2}").mkdir()
    (root / "tars [v1] {1..2}" / "0.tar").write_bytes(tar(members(range(3))))
    return root


@pytest.mark.parametrize(
    ("name", "kind", "source", "key"),
    [
        ("folder", "folder", FolderSource, "001.png"),
        ("tars", "tars", TarSource, "0.tar/00001"),
        ("tars/0.tar", "tars", TarSource, "0.tar/00001"),
        ("saved", "table", TableSource, "train/1"),
        ("parquet", "table", TableSource, "train/1"),
        ("coco", "coco", CocoSource, "train2017/001.png"),
        ("parquet/train.parquet", "table", TableSource, "train.parquet/train/1"),
        ("listed/list.csv", "table", TableSource, "list.csv/train/1"),
        ("tars [v1] {1..2}", "tars", TarSource, "0.tar/00001"),
    ],
)
def test_what_a_path_is_is_found_out(places, tmp_path, name, kind, source, key):
    path = str(places / name)
    assert find_kind(path) == kind
    for given in ("auto", kind):
        opened, root = open_source(SourceOptions(path, given, index_folder=tmp_path))
        assert isinstance(opened, source)
        assert len(opened) == 3
        assert opened.key(1).replace(root, "") == key
        assert isinstance(opened.load(1).image, Image.Image)


@pytest.mark.parametrize(
    "name", ["tars", *(pytest.param(name, marks=pytest.mark.full) for name in ("saved", "folder", "coco"))]
)
def test_every_source_can_be_shared_by_processes(places, tmp_path, name):
    source, root = open_source(SourceOptions(str(places / name), index_folder=tmp_path))
    for workers in (1, 2):
        make(Plan(source, {"canny": {}}, shard_size=1, root=root), tmp_path / str(workers), workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert len(list((tmp_path / "2").glob("*.tar"))) == 3


def test_scenes_urls_and_ids_are_known_by_their_form():
    assert find_kind("scenes") == "scenes"
    assert find_kind("somebody/images") == "table"
    assert find_kind("https://example.com/{000..127}.tar") == "tars"
    assert find_kind("s3://bucket/shard-{0..9}.tar") == "tars"
    source, root = open_source(SourceOptions("scenes", count=4))
    assert isinstance(source, SceneSource)
    assert (len(source), root) == (4, "")


@pytest.mark.parametrize(
    "text",
    [
        '[{"file_name": "a.png", "text": "x"}]',
        '[\n {"image": "a"}\n]',
        "[1]",
        "[]",
        "3",
        "null",
        '"url"',
        "[[",
    ],
)
def test_json_that_has_no_urls_is_a_table_whatever_is_in_it(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    assert find_kind(str(tmp_path / "t.json")) == "table"


def test_cocos_other_split(places):
    source, _ = open_source(SourceOptions(str(places / "coco"), split="val2017"))
    assert len(source) == 2


def settings_of(path, **changes):
    options = SourceOptions(str(path), **changes)
    return source_settings(options, open_source(options)[0])


def test_what_else_says_which_samples_a_source_has(places, tmp_path):
    rows = [{"file_name": "000.png", "text": "short", "long": "a long one"}]
    folder = write_folder(tmp_path / "folder", 1)
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    plain = settings_of(folder)
    assert plain == settings_of(folder)
    assert settings_of(folder, caption_column="long") != plain
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0] | {"text": "other"}))
    assert settings_of(folder) != plain
    other = datasets.Dataset.from_dict({"image": [b"a", b"b", b"c"], "text": ["x", "y", "z"]})
    other.save_to_disk(tmp_path / "saved")
    assert settings_of(tmp_path / "saved") != settings_of(places / "saved") == settings_of(f"{places}/saved/")
    assert settings_of(places / "coco") != settings_of(places / "coco", split="val2017")
    tars = settings_of(places / "tars", index_folder=tmp_path)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar(members(range(4))))
    assert settings_of(tmp_path / "tars", index_folder=tmp_path) != tars


@pytest.mark.parametrize(
    ("options", "name", "received", "expected", "hint"),
    [
        ({"path": "{root}/urls.txt"}, "path", "urls.txt', a list of URLs", "images", "img2dataset"),
        ({"path": "{root}/urls.csv"}, "path", "urls.csv', a list of URLs", "images", "img2dataset"),
        ({"path": "{root}/urls.parquet"}, "path", "urls.parquet', a list of URLs", "images", "img2dataset"),
        (
            {"path": "no such thing"},
            "path",
            "'no such thing', which does not exist",
            "a folder of images",
            "",
        ),
        ({"path": "{root}/urls.json"}, "path", "urls.json', a list of URLs", "images", "img2dataset"),
        ({"path": "{root}/folder", "split": "val"}, "split", "'val'", "kind folder", ""),
        ({"path": "{root}/coco", "image_column": "x"}, "image_column", "'x'", "kind coco", ""),
        ({"path": "{root}/coco", "split": "test"}, "split", "'test'", "train2017", ""),
        ({"path": "{root}/nowhere", "kind": "folder"}, "folder", "nowhere'", "folder", ""),
        ({"path": "{root}/nowhere", "kind": "tars"}, "shards", "nowhere'", "tar files", ""),
        ({"path": "{root}/nowhere", "kind": "table"}, "path", "nowhere'", "dataset", ""),
        ({"path": "{root}/nowhere", "kind": "coco"}, "images", "nowhere/train2017'", "folder", ""),
        ({"path": "scenes"}, "count", MISSING, "", ""),
    ],
)
def test_what_is_no_source_is_refused(places, options, name, received, expected, hint, tmp_path):
    filled = {option: value.format(root=places) for option, value in options.items()}
    with refused(name, received, expected=expected, hint=hint):
        open_source(SourceOptions(**filled, index_folder=tmp_path))


@pytest.mark.parametrize("name", ["folder", "tars", "parquet", "coco", "scenes"])
def test_no_source_needs_captions_where_none_are_kept(places, tmp_path, name):
    path = name if name == "scenes" else str(places / name)
    count = 2 if name == "scenes" else 0
    options = SourceOptions(path, count=count, index_folder=tmp_path, with_captions=False)
    source, root = open_source(options)
    plan = Plan(source, {"canny": {}}, captions="none", root=root)
    assert {plan.choose(source.load(n).captions, n) for n in range(2)} == {("",)}


@pytest.mark.parametrize("name", ["folder", "tars", "parquet"])
def test_a_column_of_captions_is_none_where_none_are_kept(places, tmp_path, name):
    given = {"index_folder": tmp_path, "with_captions": False, "caption_column": "foo"}
    with refused("caption_column", "'foo'", expected="captions are not read"):
        open_source(SourceOptions(str(places / name), **given))


def test_a_set_is_made_of_images_whatever_maps_they_have(tmp_path):
    folder = write_folder(tmp_path / "data" / "images", 3)
    (tmp_path / "data" / "conditioning").mkdir()
    picture(0).save(tmp_path / "data" / "conditioning" / "000.png")
    with pytest.warns(UserWarning, match="ignored maps"):
        source, _ = open_source(SourceOptions(str(folder.parent)))
    assert [source.load(index).condition for index in range(3)] == [None] * 3


def test_a_set_of_images_without_captions(tmp_path):
    folder = write_folder(tmp_path / "folder", 2)
    for text in folder.glob("*.txt"):
        text.unlink()
    options = SourceOptions(str(folder), with_captions=False)
    source, root = open_source(options)
    result = make(Plan(source, {"canny": {}}, captions="none", root=root), tmp_path / "set")
    assert result.samples == 2
    assert samples(tmp_path / "set")["000000000"]["txt"] == b""
    assert json.loads(samples(tmp_path / "set")["000000001"]["json"])["captions"] == [""]
    with refused("min_caption_length", 5):
        Plan(source, {"canny": {}}, captions="none", filters=Filters(min_caption_length=5))


def test_the_listing_covers_all_metadata(tmp_path):
    folder = write_folder(tmp_path / "folder", 1)
    write_folder(folder / "sub", 1)
    for place in (folder, folder / "sub"):
        (place / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "a"}))
    before = settings_of(folder)
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "b"}))
    assert settings_of(folder) != before
