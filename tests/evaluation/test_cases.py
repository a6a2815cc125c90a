import json
from dataclasses import asdict

import pytest
from PIL import Image
from tests import tiny
from tests.refusals import refused

from nexus_adapters.conditions import extract
from nexus_adapters.embedded.scene import SHAPES, draw_scene
from nexus_adapters.evaluation.cases import Case, Cases, content_sha256, contradicting, open_cases
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.training.config import DataOptions
from nexus_adapters.training.parsing import validated


def scenes(**changes):
    data = {"kind": "scenes", "split": "test", "count": 6, "resolution": 128}
    of_data = {name: changes.pop(name) for name in tuple(changes) if name in ("split", "count", "condition")}
    return EvaluationConfig(data=DataOptions(**data | of_data), **changes)


def cases(tmp_path, **changes):
    return open_cases(scenes(**changes), tmp_path, 8)


def test_contradicting_words_keep_all_but_the_shapes():
    for seed in range(50):
        scene = draw_scene(seed, "test")
        words = contradicting(scene).replace(",", "").replace(".", "").split()
        assert words == contradicting(scene).replace(",", "").replace(".", "").split()
        own = {item.shape for item in scene.objects}
        assert not own & set(words)
        assert sum(word in SHAPES for word in words) == len(own)
        assert all(item.color in words for item in scene.objects)
        assert scene.background in words


def captioned(folder, *captions):
    """An image for each caption."""
    folder.mkdir()
    lines = []
    for place, text in enumerate(captions):
        tiny.image(seed=place).save(folder / f"{place}.png")
        lines.append(json.dumps({"file_name": f"{place}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = DataOptions(kind="folder", path=str(folder), resolution=64)
    return EvaluationConfig(data=data, prompts="contradicting")


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a", "b", "c"], ["b", "c", "a"]),  # the next ones
        (["a", "a", "b"], ["b", "b", "a"]),  # not one's own, which would contradict nothing
        (["a cat", "A  Cat ", "a dog", "a dog"], ["a dog", "a dog", "a cat", "a cat"]),
    ],
)
def test_contradicting_captions_differ(captions, expected, tmp_path):
    found = open_cases(captioned(tmp_path / "images", *captions), tmp_path, 8)
    assert [case.prompt for case in found] == expected


def test_where_all_captions_are_the_same_nothing_contradicts(tmp_path):
    found = open_cases(captioned(tmp_path / "images", "a cat", "a cat"), tmp_path, 8)
    with refused("prompts", "contradicting"):
        found[0]


def test_prompts_change_and_words_stay(tmp_path):
    own, empty, wrong = (cases(tmp_path, prompts=p) for p in ("own", "empty", "contradicting"))
    for place in range(6):
        assert own[place].prompt == own[place].words == empty[place].words == wrong[place].words
        assert empty[place].prompt == ""
        assert wrong[place].prompt != own[place].prompt
        assert wrong[place].condition == own[place].condition


def test_scenes_edges_are_drawn_as_training_draws_them(tmp_path):
    data = DataOptions(
        kind="scenes", split="test", count=2, resolution=128, extractor={"low": 300.0, "high": 600.0}
    )
    case = open_cases(EvaluationConfig(data=data), tmp_path, 8)[0]
    assert case.condition == extract("canny", case.original, low=300.0, high=600.0)
    assert case.condition == case.scene.condition != cases(tmp_path)[0].condition
    with refused("data.extractor", "300.0", expected="depth"):
        validated(EvaluationConfig, {"data": asdict(data) | {"condition": "depth"}})


def test_splits_and_first_choose_other_scenes(tmp_path):
    later = cases(tmp_path, first=2, count=3)
    assert [case.key for case in later] == ["test scene 2", "test scene 3", "test scene 4"]
    assert later[0].condition == cases(tmp_path)[2].condition
    assert cases(tmp_path, split="novel")[0].scene.scene == draw_scene(0, "novel")


def test_the_hash_covers_prompts_maps_and_originals(tmp_path):
    hashes = [
        content_sha256(cases(tmp_path, **changes), show_progress=False)
        for changes in (
            {},
            {"prompts": "empty"},
            {"condition": "depth"},
            {"first": 1},
            {"count": 5},
            {"split": "novel"},
        )
    ]
    assert len(set(hashes)) == 6
    assert content_sha256(cases(tmp_path), show_progress=False) == hashes[0]


def test_a_case_is_read_when_it_is_asked_for(tmp_path):
    read = []
    drawn = cases(tmp_path)
    few = Cases(4, lambda place: read.append(place) or drawn[place])
    assert [case.key for case in (few[1], few[1], *few[0:3])] == [f"test scene {n}" for n in (1, 1, 0, 1, 2)]
    assert read == [1, 1, 0, 1, 2]
    with pytest.raises(IndexError, match="place: expected 0 to 3, got 4"):
        few[4]


@pytest.mark.parametrize(
    ("changes", "name", "received", "expected"),
    [
        ({"split": "train"}, "data.split", "'train'", "test or novel"),
        ({"count": 0}, "data.count", "0", "1 to"),
    ],
)
def test_scenes_of_training_and_endless_ones_are_refused(changes, name, received, expected):
    data = {"kind": "scenes", "split": "test", "count": 6, "resolution": 128} | changes
    with refused(name, received, expected=expected):
        validated(EvaluationConfig, {"data": data})


@pytest.mark.parametrize(
    "prompts", [["a red star"] * 3, ["", "a cat", "a red star " * 9], ["a cat " * 30] * 3]
)
def test_prompts_that_are_cut_are_counted_in_one_line(prompts, recwarn):
    image = Image.new("RGB", (8, 8))
    made = Cases(3, lambda place: Case(f"{place}", prompts[place], "its words", image, image))
    first = content_sha256(made, show_progress=False)
    assert not recwarn.list
    assert content_sha256(made, show_progress=False, tokenizer=tiny.tokenizer()) == first
    cut, used = sum(len(prompt) > 20 for prompt in prompts), sum(map(bool, prompts))
    assert [f"{cut} of {used}" in str(warning.message) for warning in recwarn] == [True] * bool(cut)
