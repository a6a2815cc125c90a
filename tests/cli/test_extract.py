import numpy as np
import pytest
from PIL import Image
from tests.conditions import tiny_models
from tests.png_settings import read_settings

from nexus_adapters import extract
from nexus_adapters.cli import main


@pytest.fixture
def photo(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[5:15, 10:20] = (200, 40, 90)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def run(*argv):
    return main(["extract", *map(str, argv)])


def test_writes_the_extractors_map(photo, tmp_path, capsys):
    out = tmp_path / "map.png"
    assert run("canny", photo, "--out", out, "--low", 20, "--high", 60) == 0
    with Image.open(out) as written, Image.open(photo) as original:
        assert written.mode == "RGB"
        assert np.array_equal(written, extract("canny", original, low=20, high=60))
    settings = read_settings(out)
    assert (settings["extractor"], settings["options"]) == ("canny", {"low": 20, "high": 60, "auto": False})
    assert "30x20" in capsys.readouterr().out


def test_invert(photo, tmp_path):
    run("canny", photo, "--out", tmp_path / "map.png")
    run("canny", photo, "--out", tmp_path / "inverted.png", "--invert")
    with Image.open(tmp_path / "map.png") as plain, Image.open(tmp_path / "inverted.png") as inverted:
        assert np.array_equal(255 - np.asarray(plain), inverted)
        assert np.asarray(plain).any()
    settings = [read_settings(tmp_path / name)["inverted"] for name in ("map.png", "inverted.png")]
    assert settings == [False, True]


def test_list(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--list")
    assert stop.value.code == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["canny", "depth", "segmentation", "sketch"]
    assert "needs the model depth-anything/Depth-Anything-V2-Small-hf, 99 MB" in listed[1]


def test_options_of_any_extractor(photo, tmp_path):
    out = tmp_path / "map.png"
    assert run("sketch", photo, "--out", out, "--option", "sigma=2", "--option", "coherence=0") == 0
    with Image.open(out) as written, Image.open(photo) as original:
        assert np.array_equal(written, extract("sketch", original, sigma=2, coherence=0))
    assert read_settings(out)["options"] == {"sigma": 2, "threshold": 0.08, "coherence": 0, "model": ""}
    assert run("canny", photo, "--out", out, "--option", "auto=true", "--force") == 0
    with Image.open(out) as written, Image.open(photo) as original:
        assert np.array_equal(written, extract("canny", original, auto=True))


def test_a_learned_extractor_by_folder(photo, tmp_path, capfd):
    model = tiny_models.segformer(tmp_path / "model")
    Image.new("RGB", (64, 48), "red").save(photo)
    capfd.readouterr()
    assert run("segmentation", photo, "--out", tmp_path / "map.png", "--option", f"model={model}") == 0
    assert capfd.readouterr().err == ""  # the library's bars and words for the programmer stay its own
    with Image.open(tmp_path / "map.png") as written, Image.open(photo) as original:
        assert np.array_equal(written, extract("segmentation", original, model=model))


def test_transparency_is_told(photo, tmp_path, capsys):
    Image.new("RGBA", (4, 4), (0, 0, 0, 9)).save(photo)
    assert run("canny", photo, "--out", tmp_path / "map.png") == 0
    assert "warning: IMAGE: transparent parts of" in capsys.readouterr().err


def test_existing_file_needs_force(photo, tmp_path, capsys):
    out = tmp_path / "map.png"
    out.write_text("mine")
    assert run("canny", photo, "--out", out) == 2
    assert out.read_text() == "mine"
    err = capsys.readouterr().err
    assert err.startswith("nexus extract: error: --out: ")
    assert str(out) in err
    assert run("canny", photo, "--out", out, "--force") == 0


def _argv(photo, **changes):
    parts = {"name": "canny", "image": photo, "out": photo.with_name("map.png"), "more": []} | changes
    return [parts["name"], parts["image"], "--out", parts["out"], *parts["more"]]


@pytest.mark.parametrize(
    ("changes", "named", "shown"),
    [
        ({"name": "cany"}, "NAME", ["'cany'", "canny, depth, segmentation, sketch"]),
        ({"image": "missing.png"}, "IMAGE", ["'missing.png'", "does not exist"]),
        ({"out": "map.jpg"}, "--out", ["'map.jpg'", ".png"]),
        ({"more": ["--low", "-1"]}, "--low", ["-1.0"]),
        ({"more": ["--low", "nan"]}, "--low", ["nan"]),
        ({"more": ["--low", "300"]}, "--high", ["200", "300.0"]),
        ({"more": ["--high", "inf"]}, "--high", ["inf", "100"]),
        ({"more": ["--max-megapixels", "0"]}, "--max-megapixels", ["0.0"]),
        ({"more": ["--option", "sigma"]}, "--option", ["'sigma'", "KEY=VALUE"]),
        ({"more": ["--option", "a=1", "--option", "a=2"]}, "--option", ["'a=2'", "a once"]),
        ({"more": ["--option", "low=[1]"]}, "--low", ["[1]", "a number"]),
        ({"more": ["--low", "3", "--option", "low=4"]}, "--option", ["low=4", "--low"]),
        ({"more": ["--option", "sigma=2"]}, "--option", ["'sigma'", "canny (low, high, auto)"]),
        ({"name": "sketch", "more": ["--option", "sigma=wide"]}, "--option sigma", ["'wide'", "a number"]),
        (
            {"name": "depth", "more": ["--option", "model=no/such"]},
            "--option model",
            ["'no/such'", "depth estimation"],
        ),
        ({"more": ["--max-megapixels", "0.0005"]}, "IMAGE", ["0.0005 megapixels", "30x20"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(photo, capsys, changes, named, shown):
    assert run(*_argv(photo, **changes)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"nexus extract: error: {named}: ")
    assert all(text in err for text in shown), err
    assert err.count("\n") == 1
    assert not photo.with_name("map.png").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "stub"]
)
def test_bad_files_are_one_line_and_status_2(photo, capsys, content):
    photo.write_bytes(content)
    assert run(*_argv(photo)) == 2
    err = capsys.readouterr().err
    assert err.startswith("nexus extract: error: IMAGE: ")
    assert str(photo) in err
    assert err.count("\n") == 1
