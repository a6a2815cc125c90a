import json
import pickle

import numpy as np
import pytest
from tests.data.image_files import encoded, picture
from tests.refusals import refused

from nexus_adapters.data.coco import CocoSource
from nexus_adapters.data.samples import BadSample, Source


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
        ('{"images": []}', ", which lacks 'annotations'"),
        ('{"images": [], "annotations": []}', ", which lists no images"),
        ('{"images": [{"id": 1}], "annotations": []}', ", which lacks 'file_name'"),
        (
            '{"images": [{"id": 1, "file_name": "x"}], '
            '"annotations": [{"id": 1, "image_id": 1, "caption": null}]}',
            " (None where text is expected)",
        ),
        (
            '{"images": [{"id": 1, "file_name": "../x.png"}], "annotations": []}',
            ", which names '../x.png', outside the folder",
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
