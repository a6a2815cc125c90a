"""`nexus evaluate` takes whatever `load_adapter` and `load_base` take, and reports the adapter that it is."""

import json

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from PIL import Image
from tests import tiny
from tests.single_file import save_single_file
from tests.training.runs import run, write_images

from nexus_adapters import StableDiffusionNexusPipeline, load_adapter, load_base
from nexus_adapters.adapter.formats import export_file
from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.cli import main
from nexus_adapters.embedded.held_out import load_test_scenes
from nexus_adapters.evaluation.generation import Sampling, generate

FAST = ("--steps", "1", "--guidance", "2")


def as_published(adapter):
    """The names under which T2I-Adapters were first published."""
    found = {}
    for name, tensor in adapter.state_dict().items():
        _, *parts = name.split(".")
        if parts[0] == "body" and parts[2] == "resnets":
            parts = ["body", str(2 * int(parts[1]) + int(parts[3])), *parts[4:]]
        elif parts[0] == "body":
            parts = ["body", str(2 * int(parts[1])), *parts[2:]]
        found[".".join(parts)] = tensor
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base and adapters in every form that they can be saved in."""
    root = tmp_path_factory.mktemp("sources")
    pipe = tiny.sd15()
    pipe.save_pretrained(root / "base")
    save_single_file(pipe, root / "base.safetensors")
    write_images(root / "images")
    run(root, root / "run", training__max_train_steps=2, training__ema_decay=0.5)
    run(root, root / "unfinished", training__max_train_steps=2)
    (root / "unfinished" / "adapter").rename(root / "finished")
    adapter = tiny.adapter(pipe.unet)
    adapter.save_pretrained(root / "folder")
    export_file(adapter, root / "single.safetensors")
    parts = pipe.components
    StableDiffusionNexusPipeline(**parts, adapter=adapter, requires_safety_checker=False).save_pretrained(
        root / "pipeline"
    )
    torch.manual_seed(3)
    channels = list(pipe.unet.config.block_out_channels)
    t2i = T2IAdapter(channels=channels, num_res_blocks=2, downscale_factor=8)
    t2i.save_pretrained(root / "t2i")
    torch.save(as_published(t2i), root / "t2i.pth")
    return root


def evaluated(root, out, base="base", *options):
    """What `nexus evaluate` wrote of one of the user's own images: results.json, and method -> pixels."""
    data = ("--data", root / "images", "--kind", "folder", "--resolution", 64, "--count", 1)
    command = ["evaluate", "--base", root / base, *data, *FAST, *options, "--out", out]
    assert main([str(part) for part in command]) == 0
    images = {file.parts[-3]: np.asarray(Image.open(file)) for file in out.glob("*/images/*.png")}
    return json.loads((out / "results.json").read_text()), images


FORMS = {
    "folder": "folder",
    "file": "single.safetensors",
    "pipeline": "pipeline",
    "run": "run",
    "run-adapter": "run/adapter",
    "checkpoint": "run/checkpoints/step-00000002",
    "unfinished": "unfinished",
    "finished": "finished",
    "t2i": "t2i",
    "published": "t2i.pth",
}
# What is the same adapter in several forms.
SAME = [
    ("folder", "file", "pipeline"),
    ("run", "run-adapter", "checkpoint"),
    ("unfinished", "finished"),
    ("t2i", "published"),
]


@pytest.fixture(scope="module")
def all_forms(root, tmp_path_factory):
    given = [part for name, path in FORMS.items() for part in ("--adapter", f"{name}={root / path}")]
    return evaluated(root, tmp_path_factory.mktemp("forms") / "out", "base", *given)


def test_an_adapter_generates_the_same_in_whatever_form_it_is_given(all_forms):
    _, images = all_forms
    assert set(images) == {"base", *FORMS}
    for group in SAME:
        first, *others = group
        assert not np.array_equal(images[first], images["base"]), first
        for other in others:
            assert np.array_equal(images[other], images[first]), other
    assert len({images[group[0]].tobytes() for group in SAME}) == len(SAME)


def test_results_have_the_hash_that_info_prints(root, all_forms, capsys):
    content, _ = all_forms
    capsys.readouterr()
    for name, path in FORMS.items():
        assert main(["info", str(root / path)]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("sha256"))
        assert line.split()[1] == content["methods"][name]["sha256"] != "", name
        assert content["methods"][name]["adapter"] == str(root / path)
    for group in SAME[:-1]:  # a pickle's hash is its file's
        assert len({content["methods"][name]["sha256"] for name in group}) == 1, group


def test_a_base_generates_the_same_in_whatever_form_it_is_given(root, tmp_path):
    adapter = ("--adapter", f"mine={root / 'folder'}")
    _, expected = evaluated(root, tmp_path / "folder", "base", *adapter)
    single = ("base.safetensors", "--base-config", root / "base", *adapter)
    for name, options in (("pipeline", ("pipeline", *adapter)), ("single", single)):
        _, images = evaluated(root, tmp_path / name, *options)
        assert set(images) == set(expected)
        for method, pixels in images.items():
            assert np.array_equal(pixels, expected[method]), (name, method)


def test_names_are_those_of_the_condition(tmp_path):
    out = tmp_path / "out"
    command = ["evaluate", "--condition", "depth", "--adapter", "slim", "--count", "1", *FAST]
    assert main([*command, "--out", str(out)]) == 0
    scenes = load_test_scenes(1, condition_name="depth")
    (expected,) = generate(load_base(), load_adapter("slim", "depth"), scenes, Sampling(1, 2.0, 0, 1))
    assert np.array_equal(np.asarray(Image.open(out / "slim" / "images" / "00000.png")), expected)
    found = json.loads((out / "results.json").read_text())["methods"]["slim"]["sha256"]
    assert found == find_saved("slim", "depth").sha256() != find_saved("slim", "canny").sha256()


@pytest.mark.parametrize(
    ("options", "option", "received"),
    [
        (("--adapter", "t2i", "--condition", "depth"), "--adapter", "'t2i'"),
        (("--adapter", "prime", "--base", "ROOT/base"), "--adapter", "'prime'"),
        (("--adapter", "a=ROOT/images"), "--adapter", "ROOT/images'"),
        (("--adapter", "a=ROOT/base"), "--adapter", "ROOT/base'"),
        (("--base", "ROOT/folder"), "--base", "ROOT/folder'"),
        (("--base", "nowhere"), "--base", "'nowhere'"),
        (("--base", "ROOT/base.safetensors"), "--base-config", "stable-diffusion-v1-5"),
    ],
)
def test_what_is_no_adapter_or_base_is_one_line(root, tmp_path, capsys, options, option, received):
    given = [part.replace("ROOT", str(root)) for part in options]
    data = () if "--condition" in options else ("--data", str(root / "images"), "--kind", "folder")
    assert main(["evaluate", *data, "--count", "1", *given, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nexus evaluate: error: {option}")
    assert received.replace("ROOT", str(root)) in line
    assert not (tmp_path / "out").exists()
