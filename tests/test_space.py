"""The Hugging Face Space: its page is built, its function generates, and its files fit the package."""

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image
from tests.weights import use_weights, write_tiny

import nexus_adapters
from nexus_adapters.bundled import BUNDLED

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces"
gradio = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, write_tiny(tmp_path_factory.mktemp("space") / "weights"))
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_the_page_has_an_input_for_every_argument(app):
    (event,) = app.build().fns.values()
    assert len(event.inputs) == app.generate.__code__.co_argcount
    assert event.fn.__name__ == "generate"


def test_an_image_of_any_size_gives_an_image_and_its_map(app):
    wide = Image.new("RGBA", (300, 200), "white")
    image, structure = app.generate(app.PROMPT, wide, "canny", False, "prime", 1.0, 0)
    assert image.size == structure.size == app.SIZE
    again, _ = app.generate(app.PROMPT, wide, "canny", False, "prime", 1.0, 0)
    other, _ = app.generate(app.PROMPT, wide, "canny", False, "prime", 1.0, 1)
    assert image.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("given", [(None, "canny", False), (Image.new("RGB", (128, 128)), "depth", False)])
def test_what_is_missing_is_said(app, given):
    image, condition, is_map = given
    with pytest.raises(gradio.Error):
        app.generate(app.PROMPT, image, condition, is_map, "prime", 1.0, 0)


def test_every_choice_has_an_adapter(app):
    adapters = BUNDLED["embedded"].adapters
    assert {(c, v) for c in app.CONDITIONS for v in app.VARIANTS} <= {
        (c, v) for c in adapters for v in adapters[c]
    }


def test_its_versions_are_those_of_the_package():
    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert fields["sdk_version"] in Requirement(*extras["app"]).specifier
    assert (SPACE / fields["app_file"]).is_file()
    (line,) = [
        line for line in (SPACE / "requirements.txt").read_text().splitlines() if line.startswith("nexus")
    ]
    requirement = Requirement(line)
    assert requirement.extras <= set(extras)
    assert requirement.specifier.contains(nexus_adapters.__version__, prereleases=True)
