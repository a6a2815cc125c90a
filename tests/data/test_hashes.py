"""A sample has one hash in every kind of dataset, and its image has one under any map and caption."""

import json
from itertools import combinations

import datasets
import pytest
from tests.data.image_files import encoded, picture
from tests.data.tar_files import tar
from tests.prepare.sets import make

from nexus_adapters.data.coco import CocoSource
from nexus_adapters.data.conditioned import KnownHashes
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.prepared_set import open_prepared
from nexus_adapters.data.samples import BadSample
from nexus_adapters.data.table import TableSource
from nexus_adapters.data.tars import TarSource
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.prepare.plan import Plan

COUNT = 3
IMAGES = [encoded(picture(number)) for number in range(COUNT)]
MAPS = [encoded(picture(10 + number)) for number in range(COUNT)]
CAPTIONS = [f"picture {number}" for number in range(COUNT)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def files(folder, contents, ending):
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number}{ending}").write_bytes(content)


def opened(place, kind, with_maps, captions=CAPTIONS):
    """The same samples as a dataset of this kind."""
    texts = [caption.encode() for caption in captions]
    rows = [
        {"file_name": f"images/{number}.png", "text": captions[number], "map": f"maps/{number}.png"}
        for number in range(COUNT)
    ]
    files(place / "images", IMAGES, ".png")
    if kind == "folder":
        files(place / "images", texts, ".txt")
        if with_maps:
            files(place / "conditioning", MAPS, ".png")
            return FolderSource(place, condition_column="conditioning")
        return FolderSource(place / "images")
    files(place / "maps", MAPS, ".png")
    if kind == "metadata":
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return FolderSource(place, condition_column="map" if with_maps else None)
    if kind == "table":
        (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return TableSource(place / "rows.jsonl", condition_column="map" if with_maps else None)
    if kind == "tars":
        members = [
            (f"{number}.{ending}", content)
            for number in range(COUNT)
            for ending, content in (
                ("png", IMAGES[number]), ("map.webp", MAPS[number]), ("txt", texts[number])
            )
        ]  # fmt: skip
        (place / "a.tar").write_bytes(tar(members))
        maps = {"condition_column": "map.webp"} if with_maps else {}
        return TarSource([str(place / "a.tar")], index_folder=place / "index", **maps)
    listed = [{"id": number, "file_name": f"{number}.png"} for number in range(COUNT)]
    noted = [{"id": n, "image_id": n, "caption": caption} for n, caption in enumerate(captions)]
    (place / "captions.json").write_text(json.dumps({"images": listed, "annotations": noted}))
    return CocoSource(place / "captions.json", place / "images")


def hashes(source):
    indices = range(COUNT)
    return [source.content_hash(index) for index in indices], [source.image_hash(index) for index in indices]


KINDS = ["folder", "metadata", "table", "tars", "coco"]


def test_every_two_kinds_agree_on_samples_and_images(tmp_path):
    plain = {kind: hashes(opened(tmp_path / kind, kind, False)) for kind in KINDS}
    mapped = {kind: hashes(opened(tmp_path / f"{kind} m", kind, True)) for kind in KINDS[:-1]}
    renamed = {kind: hashes(opened(tmp_path / f"{kind} n", kind, False, ["x"] * COUNT)) for kind in KINDS}
    for found in (plain, mapped, renamed):
        for one, other in combinations(found, 2):
            assert found[one] == found[other], (one, other)
        assert all(len(set(each)) == COUNT for each in found["folder"])
    (of_plain, images), (of_mapped, under_maps), (of_renamed, under_words) = (
        found["folder"] for found in (plain, mapped, renamed)
    )
    assert images == under_maps == under_words
    assert not set(of_plain) & {*of_mapped, *of_renamed}


def test_two_maps_of_a_prepared_set_have_the_same_images(tmp_path):
    make(Plan(SceneSource(COUNT), {"canny": {}, "sketch": {}}), tmp_path / "set")
    samples, images = zip(
        *(hashes(open_prepared(tmp_path / "set", name, tmp_path / "index")) for name in ("canny", "sketch")),
        strict=True,
    )
    assert images[0] == images[1]
    assert len(set(images[0])) == COUNT
    assert not set(samples[0]) & set(samples[1])


def test_a_scene_is_the_same_image_under_any_map_and_number():
    plain = SceneSource(4).image_hash(3)
    assert plain == SceneSource(1, first_seed=3, phrasings=1, condition_name="depth").image_hash(0)
    assert plain != SceneSource(4).image_hash(2)


@pytest.mark.parametrize("kind", ["metadata", "table", "coco"])
def test_an_image_that_is_gone_has_no_hash(tmp_path, kind):
    source = opened(tmp_path, kind, False)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(BadSample, match=r"images/1\.png"):
        source.image_hash(1)


def test_hashes_of_images_are_kept_next_to_those_of_samples(tmp_path, monkeypatch):
    source = opened(tmp_path / "a", "folder", False)
    with KnownHashes(tmp_path / "hashes.jsonl").kept() as known:
        found = known.content_hash(source, 0), known.image_hash(source, 0)
    assert found == (source.content_hash(0), source.image_hash(0))
    monkeypatch.setattr(FolderSource, "image_hash", lambda *given: pytest.fail("hashed again"))
    assert KnownHashes(tmp_path / "hashes.jsonl").image_hash(source, 0) == found[1]
