import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops, ImageFont
from tests import tiny
from tests.png_settings import read_settings
from tests.weights import use_weights

from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.choices import STEPS
from nexus_adapters.cli import main
from nexus_adapters.cli.demo_sheet import (
    CELL,
    CHOICE,
    FAILURE,
    FAILURE_HEADING,
    PROMPTS_PER_MAP,
    SCENE_SEEDS,
    Method,
    Row,
    Sheet,
    changed_words,
    demo_scenes,
    draw_sheet,
    generate_all,
    has_novel,
    lay_out,
    load_methods,
    sampling_of,
    wrap,
)
from nexus_adapters.embedded.held_out import SCENE_METRICS
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.scene import draw_scene
from nexus_adapters.evaluation.generation import Sampling
from nexus_adapters.files import file_sha256

GUIDANCE = BUNDLED["embedded"].guidance_scale
METHODS = ["base", "t2i", "slim", "prime"]
IMAGES = len(METHODS) * len(SCENE_SEEDS) * PROMPTS_PER_MAP


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tiny_weights):
    """The folder of a demo by tiny random weights, and the lines that it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / "new" / "demo", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        use_weights(patch, tiny_weights)
        assert main(["demo", "--out", str(out), "--steps", "1", "--seed", "3"]) == 0
    return out, printed.getvalue().splitlines()


@pytest.fixture
def out(demo):
    return demo[0]


@pytest.fixture
def report(out):
    return json.loads((out / "demo.json").read_text())


@pytest.fixture
def no_model(monkeypatch, unreadable_weights):
    """What is checked is checked before anything is loaded: the base cannot be."""
    use_weights(monkeypatch, unreadable_weights)


def test_two_files_and_no_other(out):
    assert sorted(file.name for file in out.iterdir()) == ["demo.json", "demo.png"]


def test_the_report_is_complete(report):
    assert (report["steps"], report["guidance"], report["seed"]) == (1, GUIDANCE, 3)
    assert set(report["versions"]) >= {"nexus-adapters", "torch", "diffusers"}
    assert list(report["weights_sha256"]) == METHODS
    assert len(set(report["weights_sha256"].values())) == len(METHODS)
    assert set(report["machine"]) == {"processor", "cores", "accelerator", "system", "python"}
    assert report["total_s"] > 0
    assert 0.05 < report["peak_memory_gib"] < 8
    assert list(report["methods"]) == METHODS
    assert [report["methods"][name]["adapter"] for name in METHODS] == [None, "t2i", "slim", "prime"]
    assert report["methods"]["base"]["parameters"] == 0
    assert all(report["methods"][name]["parameters"] > 1000 for name in METHODS[1:])
    assert all(method["generation_s"] > 0 for method in report["methods"].values())


def test_every_image_is_scored(report):
    images = report["images"]
    assert len(images) == IMAGES
    for image in images:
        assert all(0 <= image[metric] <= 1 for metric in SCENE_METRICS)
        assert image["scene_seed"] == SCENE_SEEDS[image["noise_row"]]
    prompts = {(image["scene_seed"], image["prompt"]) for image in images}
    assert len(prompts) == len(SCENE_SEEDS) * PROMPTS_PER_MAP
    for name in METHODS:
        rows = [image for image in images if image["method"] == name]
        assert {(image["scene_seed"], image["prompt"]) for image in rows} == prompts
        for metric in SCENE_METRICS:
            mean = np.mean([image[metric] for image in rows])
            assert report["mean"][name][metric] == pytest.approx(mean, abs=1e-3)


def test_the_sheet_has_a_cell_for_every_image(out):
    with Image.open(out / "demo.png") as image:
        assert image.mode == "RGB"
        assert image.width > CELL * (len(METHODS) + 1)
        assert image.height > CELL * len(SCENE_SEEDS) * PROMPTS_PER_MAP
        pixels = np.asarray(image)
    assert (pixels[:20] == 255).all()  # margins
    assert (pixels[-20:] == 255).all()
    assert (pixels[:, :20] == 255).all()
    assert (pixels[:, -20:] == 255).all()
    settings = read_settings(out / "demo.png")
    assert (settings["command"], settings["seed"]) == ("demo", 3)


def test_it_prints_where_the_files_are_and_the_mean_scores(demo):
    out, lines = demo
    assert lines[:2] == [str(out / "demo.png"), str(out / "demo.json")]
    assert [line.split()[0] for line in lines[4:]] == METHODS
    assert all(len(line.split()) == 1 + len(SCENE_METRICS) for line in lines[4:])


@pytest.mark.full
def test_the_same_command_makes_the_same_images(out, report, tmp_path, monkeypatch, tiny_weights):
    use_weights(monkeypatch, tiny_weights)
    (tmp_path / "notes.txt").touch()  # an existing folder is fine
    for more in ([], ["--force"]):
        assert main(["demo", "--out", str(tmp_path), "--steps", "1", "--seed", "3", *more]) == 0
        assert json.loads((tmp_path / "demo.json").read_text())["images"] == report["images"]


class Recording(StableDiffusionPipeline):
    """Keeps the noise of each call."""

    def __call__(self, **arguments):
        self.noise = [*getattr(self, "noise", []), arguments["latents"]]
        return super().__call__(**arguments)


def test_a_maps_noise_is_the_same_for_every_prompt():
    base = tiny.sd15(Recording)
    maps = [demo_scenes(seed) for seed in SCENE_SEEDS]
    (result,) = generate_all(base, [Method("base", None, None)], maps, Sampling(1, GUIDANCE, 7))
    first, *others = base.noise
    assert len(others) == PROMPTS_PER_MAP - 1
    assert len(first) == len(maps)
    assert all(torch.equal(noise, first) for noise in others)
    assert not torch.equal(first[0], first[1])
    assert [SCENE_SEEDS[row] for row in result.noise_rows] == list(SCENE_SEEDS) * PROMPTS_PER_MAP
    for scene, row in zip(result.scenes, result.noise_rows, strict=True):
        assert scene.condition is maps[row][0].condition


@pytest.mark.full
@pytest.mark.parametrize("name", ["depth", "segmentation", "sketch"])
def test_other_maps_are_shown_with_the_adapters_that_there_are(tmp_path, monkeypatch, tiny_weights, name):
    use_weights(monkeypatch, tiny_weights)
    assert main(["demo", "--condition", name, "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report["condition"] == name
    assert list(report["methods"]) == ["base", "slim", "prime"]


def test_other_maps_have_the_methods_that_there_are(monkeypatch, tiny_weights):
    use_weights(monkeypatch, tiny_weights)
    _, methods = load_methods("depth")
    assert [method.name for method in methods] == ["base", "slim", "prime"]
    scene = demo_scenes(8, "depth")[0]
    assert np.array_equal(scene.condition, draw_map("depth", draw_scene(8, "test")))


@pytest.mark.parametrize("name", ["demo.png", "demo.json"])
def test_existing_files_are_kept_and_nothing_is_done(tmp_path, capsys, no_model, name):
    (tmp_path / name).write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    refused_in_one_line(capsys, "--out", f"'{tmp_path / name}'")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "name", "shown"),
    [
        (["--steps", "0"], "--steps", "from 1 to 1000, got 0"),
        (["--condition", "pose"], "--condition", "canny, depth, segmentation, sketch, got 'pose'"),
        (["--seed", "-1"], "--seed", "from 0 to 4294967295, got -1"),
        (["--guidance", "nan"], "--guidance", "got nan"),
        (["--out", "file"], "--out", "'file', which is a file"),
        (["--out", "file/sub"], "--out", "'file/sub' (Not a directory)"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, no_model, options, name, shown):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["demo", *options]) == 2
    refused_in_one_line(capsys, name, shown)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def refused_in_one_line(capsys, name, shown):
    """Nothing on stdout; on stderr, in one line, the option and what was wrong with its value."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nexus demo: error: {name}: ")
    assert shown in err
    assert err.count("\n") == 1


def test_missing_weights_are_a_failure_of_one_line(tmp_path, monkeypatch, capsys):
    use_weights(monkeypatch, tmp_path)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("nexus demo: error: ")
    assert f"'{tmp_path / 'canny'}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("seed", SCENE_SEEDS)
def test_prompts_of_a_map_differ_in_colors_alone(seed):
    first, *others = demo_scenes(seed)
    assert first.scene == draw_scene(seed, "test")
    assert len(others) == PROMPTS_PER_MAP - 1
    for other in others:
        assert other.condition is first.condition
        assert len(other.prompt.split()) == len(first.prompt.split())
        assert not has_novel(other.scene)
        back = [
            replace(item, color=original.color)
            for item, original in zip(other.scene.objects, first.scene.objects, strict=True)
        ]
        assert replace(other.scene, objects=tuple(back), background=first.scene.background) == first.scene
        assert all(item.color != other.scene.background for item in other.scene.objects)
        changed = changed_words(other.prompt, first.prompt)
        assert sum(changed) == len(first.scene.objects) + 1  # every object's color, and the background's
        assert np.array_equal(other.rendering.visible, first.rendering.visible)


def test_what_was_chosen_by_score_is_said_of_these_images_alone():
    def sheet(condition_name, steps, seed):
        maps = [demo_scenes(number, condition_name) for number in SCENE_SEEDS]
        return lay_out(maps, [], sampling_of(steps, None, seed), condition_name)

    chosen = sheet("canny", STEPS, 0)
    assert CHOICE in chosen.footer
    assert chosen.headings == {SCENE_SEEDS.index(FAILURE): FAILURE_HEADING}
    for other in (sheet("segmentation", STEPS, 0), sheet("canny", 2, 0), sheet("canny", STEPS, 1)):
        assert CHOICE not in other.footer
        assert other.headings == {}


def test_the_committed_sheet_shows_what_its_footer_says():
    images = json.loads((Path(__file__).parents[2] / "docs" / "demo.json").read_text())["images"]

    def right(seed):
        """The methods that get all colors right, with every prompt."""
        rows = [image for image in images if image["scene_seed"] == seed]
        wrong = {image["method"] for image in rows if image["binding_color"] < 1}
        return {image["method"] for image in rows} - wrong

    assert [right(seed) for seed in SCENE_SEEDS] == [{"t2i", "slim", "prime"}, {"slim", "prime"}, set()]


def test_lines_are_wrapped():
    font = ImageFont.load_default(20)
    words = ["aa", "bb", "cc", "a" * 200]
    lines = list(wrap(words, font, int(font.getlength("aa bb")) + 1))
    assert lines == [["aa", "bb"], ["cc"], ["a" * 200]]
    assert list(wrap([], font, 10)) == []


def test_changed_words_leave_out_articles():
    assert changed_words("an orange cat here", "a red cat") == [False, True, False, True]


def test_a_long_prompt_makes_its_row_higher_and_moves_nothing_sideways():
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    columns = [("A", "a"), ("B", "b")]
    short, long = (
        draw_sheet(Sheet(columns, [[Row("word " * count, images, ["", "1"])]], ["end"])) for count in (1, 60)
    )
    assert short.width == long.width
    assert long.height > short.height
    blue = [ImageChops.difference(sheet, Image.new("RGB", sheet.size, "blue")) for sheet in (short, long)]
    for difference in blue:
        hits = (np.asarray(difference) == 0).all(axis=-1)
        assert hits.sum() == CELL * CELL
        assert len(np.unique(np.nonzero(hits)[1])) == CELL


def test_the_committed_sheet_is_of_the_shipped_weights_and_was_made_in_time():
    report = json.loads((Path(__file__).parents[2] / "docs" / "demo.json").read_text())
    for name, digest in report["weights_sha256"].items():
        adapter = report["methods"][name]["adapter"]
        unet = BUNDLED["embedded"].folder / "unet" / "diffusion_pytorch_model.safetensors"
        assert digest == (file_sha256(unet) if adapter is None else find_saved(adapter).sha256())
    assert report["guidance"] == GUIDANCE
    assert report["total_s"] < 90
    assert report["peak_memory_gib"] < 3


@pytest.mark.full
def test_the_shipped_adapters_follow_the_map_and_the_words(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    mean = json.loads((tmp_path / "demo.json").read_text())["mean"]
    assert mean["prime"]["edge_f1"] > mean["base"]["edge_f1"] + 0.1
    assert mean["prime"]["binding_color"] > mean["base"]["binding_color"] + 0.1
