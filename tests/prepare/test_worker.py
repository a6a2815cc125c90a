"""What becomes of images of every kind."""

import errno
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tests.conditions import tiny_models
from tests.data.image_files import DAMAGED, GOOD, encoded, picture
from tests.prepare.sets import image, make, samples, skipped

from nexus_adapters.conditions import EXTRACTORS, Extractor, extract, load_image, register_condition
from nexus_adapters.data.crop import Geometry
from nexus_adapters.data.folder import FolderSource
from nexus_adapters.data.samples import BadSample
from nexus_adapters.embedded.scene_source import SceneSource
from nexus_adapters.prepare.filters import Filters
from nexus_adapters.prepare.plan import Plan

FRAMES = [picture(number) for number in range(3)]
ODD = GOOD | {
    "animated.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "one-pixel.png": encoded(picture(5, 1, 1)),
    "one-row.png": encoded(picture(5, 300, 1)),
    "two-tone.png": encoded(picture(5).convert("1")),
    "grey-alpha.png": encoded(picture(5).convert("LA")),
}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd")
    for name, content in (ODD | DAMAGED).items():
        if content is not None:
            (path / name).write_bytes(content)
    rows = [json.dumps({"file_name": name, "text": [f"the {name}", "an image"]}) for name in ODD | DAMAGED]
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


@pytest.mark.filterwarnings("ignore:.*transparent parts.*")
def test_images_of_every_kind_are_right_or_left_out_with_a_reason(odd_folder, tmp_path):
    conditions = {"canny": {"low": 20, "high": 40}, "sketch": {}}
    plan = Plan(FolderSource(odd_folder), conditions, image_format="png", root=f"{odd_folder}/", shard_size=7)
    result = make(plan, tmp_path)
    found = samples(tmp_path)
    assert result.samples == len(found) == len(ODD)
    for (key, files), name in zip(found.items(), ODD, strict=True):
        expected = load_image(odd_folder / name)
        assert np.array_equal(image(files["png"]), expected), name
        for condition, options in conditions.items():
            wanted = extract(condition, expected, **options)
            assert np.array_equal(image(files[f"{condition}.png"]), wanted), (name, condition)
        about = json.loads(files["json"])
        assert about == {
            "source": name, "captions": [f"the {name}", "an image"], "original_size": list(expected.size),
        }  # fmt: skip
        assert key == f"{list(ODD | DAMAGED).index(name):09d}"
    assert [row["source"] for row in skipped(tmp_path)] == list(DAMAGED)
    assert {row["kind"] for row in skipped(tmp_path)} == {"unreadable"}
    assert all(
        "expected" in row["reason"] and str(odd_folder) not in row["reason"] for row in skipped(tmp_path)
    )
    assert result.skipped == {"unreadable": len(DAMAGED)}


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (None, (301, 200)),
        (Geometry(128, 128), (128, 128)),
        (Geometry.bucketed(128, step=32), (160, 96)),
        (Geometry(400, 160), (400, 160)),
    ],
)
def test_image_and_maps_stay_aligned_to_the_pixel(tmp_path, geometry, size):
    """A marker in the image has its outline in every map, where the marker ends."""
    marked = Image.new("RGB", (301, 200), (40, 40, 40))
    ImageDraw.Draw(marked).rectangle((120, 60, 179, 139), fill=(250, 250, 250))
    folder = tmp_path / "images"
    folder.mkdir()
    marked.save(folder / "marked.png")
    (folder / "marked.txt").write_text("a marker")
    plan = Plan(FolderSource(folder), {"canny": {}, "sketch": {}}, geometry, image_format="png")
    make(plan, tmp_path / "set")
    ((_, files),) = samples(tmp_path / "set").items()
    shown = np.asarray(image(files["png"]), int)[..., 0]
    assert shown.shape == size[::-1]
    is_marker = shown > 145
    rows, columns = np.nonzero(is_marker)
    box = np.array([rows.min(), rows.max(), columns.min(), columns.max()])
    for name in ("canny", "sketch"):
        lines = np.asarray(image(files[f"{name}.png"]))[..., 0] > 127
        assert lines.shape == shown.shape
        rows, columns = np.nonzero(lines)
        drawn = np.array([rows.min(), rows.max(), columns.min(), columns.max()])
        outside = (drawn - box) * [-1, 1, -1, 1]  # by how much the lines reach beyond each of the four edges
        assert outside.min() >= -1
        assert outside.max() <= {"canny": 1, "sketch": 4}[name]  # a pen's width
        assert np.ptp(outside) <= 1


def test_learned_maps_are_aligned_with_the_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    noise.save(folder / "noise.png")
    (folder / "noise.txt").write_text("noise")
    models = {
        "depth": {"model": tiny_models.dpt(tmp_path / "dpt")},
        "segmentation": {"model": tiny_models.segformer(tmp_path / "segformer")},
    }
    make(Plan(FolderSource(folder), models, Geometry(64, 64), image_format="png"), tmp_path / "set")
    ((_, files),) = samples(tmp_path / "set").items()
    fitted = Geometry(64, 64).fit(noise, (64, 64))
    for name, options in models.items():
        assert np.array_equal(image(files[f"{name}.png"]), extract(name, fitted, **options))


@pytest.fixture
def forgotten():
    """What a test registers is forgotten again."""
    with EXTRACTORS.temporary():
        yield


def test_maps_are_extracted_in_batches_and_one_bad_image_harms_no_other(tmp_path, forgotten):
    batches = []

    def copy(image):
        if np.asarray(image)[0, 0, 0] == bad:
            raise RuntimeError("no\nmap")  # extractors of others raise anything
        return image

    def extract_many(images):
        batches.append(len(images))
        return [copy(image) for image in images]

    bad = np.asarray(SceneSource(10).load(6).image)[0, 0, 0]
    register_condition(Extractor("copy", copy, "", extract_many=extract_many))
    plan = Plan(SceneSource(10), {"copy": {}}, batch_size=4, image_format="png")
    result = make(plan, tmp_path)
    assert batches == [4, 4, 2]
    found = samples(tmp_path)
    assert all(np.array_equal(image(files["png"]), image(files["copy.png"])) for files in found.values())
    assert result.skipped["map"] == 10 - len(found) > 0
    assert skipped(tmp_path)[0]["reason"] == "expected maps that can be extracted, got no map"


@pytest.mark.parametrize(("image_format", "size"), [("jpg", (66000, 4)), ("webp", (20000, 4))])
def test_what_a_format_cannot_hold_is_left_out(tmp_path, image_format, size):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in {"a": picture(0), "long": picture(1, *size)}.items():
        content.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    make(Plan(FolderSource(folder), {"canny": {}}, image_format=image_format), tmp_path / "set")
    assert len(samples(tmp_path / "set")) == 1
    (left,) = skipped(tmp_path / "set")
    assert left["kind"] == "image"
    assert left["reason"].startswith(f"expected what {image_format} and PNG can hold, got ")


def test_comments_and_profiles_of_the_source_stay_there(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(0).save(folder / "a.jpg", comment=b"where I live", icc_profile=b"a profile")
    picture(1).convert("P").save(folder / "b.gif", comment=b"x" * 70_000)
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    for image_format in ("jpg", "png", "webp"):
        out = tmp_path / image_format
        make(Plan(FolderSource(folder), {"canny": {}}, image_format=image_format), out)
        found = samples(out)
        assert len(found) == 2
        for files in found.values():
            assert b"where I live" not in files[image_format]
            with Image.open(io.BytesIO(files[image_format])) as written:
                assert not {"icc_profile", "comment"} & set(written.info)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(errno.EIO, "Input/output error"),
        cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes"),
    ],
)
def test_a_failing_machine_stops_the_run_and_leaves_nothing_out(tmp_path, forgotten, error):
    calls = []

    def copy(image):
        calls.append(image)
        if len(calls) == 4:  # the first is the trial before the run
            raise error
        return image

    register_condition(Extractor("copy", copy, ""))
    plan = Plan(SceneSource(6), {"copy": {}}, batch_size=2)
    with pytest.raises(type(error)):
        make(plan, tmp_path)
    assert make(plan, tmp_path).skipped == {}
    assert len(samples(tmp_path)) == 6


def test_a_bad_file_may_be_called_as_it_likes(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(0).save(folder / "good.png")
    (folder / "CUDA error, out of memory.png").write_bytes(b"broken")
    for name in ("good", "CUDA error, out of memory"):
        (folder / f"{name}.txt").write_text("a picture")
    assert make(Plan(FolderSource(folder), {"canny": {}}), tmp_path / "set").skipped == {"unreadable": 1}


def test_a_failing_disk_stops_the_run(tmp_path):
    class FailingSource(SceneSource):
        def load(self, index):
            try:
                raise OSError(errno.EIO, "Input/output error")
            except OSError as error:
                raise BadSample("image: expected a readable file, got 'a' (Input/output error)") from error

    with pytest.raises(OSError, match=r"image: expected a readable file, got 'a' \(Input/output error\)"):
        make(Plan(FailingSource(2), {"canny": {}}), tmp_path)


def test_near_duplicates_are_left_out_but_not_of_what_is_left_out_itself(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pictures = {
        "a-small.png": SceneSource(9).load(0).image.resize((60, 60)),
        "b.png": SceneSource(9).load(0).image,
        "c.png": SceneSource(9).load(1).image,
        "d-again.png": SceneSource(9).load(0).image.resize((200, 200)),
        "e.png": SceneSource(9).load(2).image,
    }
    for name, content in pictures.items():
        content.save(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    source, filters = FolderSource(folder), Filters(min_side=100, near_duplicates=4)
    plan = Plan(source, {"canny": {}}, filters=filters, shard_size=2, root=f"{folder}/")
    make(plan, tmp_path / "set")
    kept = [json.loads(files["json"])["source"] for files in samples(tmp_path / "set").values()]
    assert kept == ["b.png", "c.png", "e.png"]
    assert [(row["source"], row["kind"]) for row in skipped(tmp_path / "set")] == [
        ("a-small.png", "small"), ("d-again.png", "near-duplicate"),
    ]  # fmt: skip
    assert skipped(tmp_path / "set")[1]["reason"].endswith("got one of 'b.png'")
    make(Plan(source, {"canny": {}}), tmp_path / "all")
    assert len(samples(tmp_path / "all")) == 5


def test_captions_of_the_source_are_chosen(tmp_path):
    plan = Plan(SceneSource(4), {"canny": {}}, captions="random")
    make(plan, tmp_path)
    for index, files in enumerate(samples(tmp_path).values()):
        expected = plan.choose(SceneSource(4).load(index).captions, index)
        assert tuple(json.loads(files["json"])["captions"]) == expected
        assert files["txt"].decode() == expected[0]
