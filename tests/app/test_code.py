"""The code next to an image generates this image again, bit for bit, in Python and on the command line."""

import random
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tests.app.pages import drawn

from nexus_adapters.app.code import command_line, command_text, files_of, python_code
from nexus_adapters.app.form import ControlForm, Form
from nexus_adapters.app.models import AdapterSource, Models
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.choices import BALANCE_NAMES, POLICIES, RESIZE_MODES
from nexus_adapters.cli import build_parser, main
from nexus_adapters.cli.generate_requests import parse
from nexus_adapters.generation.requests import (
    SCHEDULERS,
    BaseRequest,
    ControlRequest,
    GenerateRequest,
    ImageSource,
    LoraRequest,
    MapSource,
)

pytestmark = pytest.mark.usefixtures("weights")


def picture():
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((8, 8, 50, 50), fill="tomato")
    return image


def lines():
    image = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(image).rectangle((10, 12, 50, 40), outline="white")
    return image


def half():
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 30, 64))
    return image


PICTURE = ControlForm(picture=drawn(picture()), scale=0.8, end=0.6)
MAP = ControlForm(picture=drawn(lines()), is_map=True, condition="sketch", policy="per_branch")
FORMS = {
    "picture": Form((PICTURE,), prompt="a red star", steps=2, seed=3),
    "edited map": Form(
        (ControlForm(picture=drawn(picture()), map=drawn(lines(), is_edited=True), noise_exponent=0.5),),
        prompt='it\'s "a" ring',
        negative="-a cross",
        steps=2,
        guidance=3.5,
    ),
    "mask": Form((ControlForm(drawn(picture()), mask=drawn(half())), MAP), prompt="a ring", steps=2),
    "other shape": Form((PICTURE,), prompt="a ring", steps=2, width=64, height=48, resize_mode="crop"),
    "no adapter": Form((PICTURE,), prompt="a ring", steps=2),
    "own base": Form((MAP,), prompt="a ring", steps=2),
}


LONG = ("other shape", "no adapter")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in FORMS]
)
def test_both_codes_generate_the_image_again(name, weights, tmp_path, monkeypatch):
    models, column = Models(), "No adapter" if name == "no adapter" else "Slim"
    code_folder = tmp_path / "code"
    code_folder.mkdir()
    if name == "own base":
        adapter = weights / BUNDLED["embedded"].adapters["sketch"]["slim"]
        models = Models(
            BaseRequest(str(weights / "base")), (AdapterSource(str(adapter), "sketch"),), dtype="bfloat16"
        )
        column = adapter.name
        for folder in (weights / "base", adapter):  # the code names folders without their parents
            (code_folder / folder.name).symlink_to(folder)
    folder = tmp_path / "session"
    folder.mkdir()
    request = FORMS[name].request(models, folder)
    (_, request), *_ = models.requests(request, [column])
    made = models.generate(request)
    pixels = np.asarray(made.image)

    for file in files_of(request):
        shutil.copy(file, code_folder)
    monkeypatch.chdir(code_folder)
    exec(compile(python_code(request, made.settings), name, "exec"), {})
    assert (np.asarray(Image.open("image.png")) == pixels).all()
    command = shlex.split(command_text(request, "command.png").replace("\\\n", " "))
    assert main(command[1:]) == 0
    assert (np.asarray(Image.open("command.png")) == pixels).all()


def test_code_shows_no_folders(tmp_path):
    request = GenerateRequest(
        "a ring",
        (
            ControlRequest(
                MapSource(str(tmp_path / "map.png")), adapter=str(tmp_path), mask=str(tmp_path / "mask.png")
            ),
        ),
        guidance=2.0,
        base=BaseRequest(str(tmp_path)),
    )
    settings = {"width": 64, "height": 64, "device": "cuda", "dtype": "float16"}
    for code in (command_text(request), python_code(request, settings)):
        assert str(tmp_path.parent) not in code
    compile(python_code(request, settings), "code", "exec")


def test_a_folder_is_not_taken_for_an_embedded_adapter(tmp_path):
    folder = tmp_path / "prime"
    folder.mkdir()
    request = GenerateRequest("", (ControlRequest(MapSource("map.png"), adapter=str(folder)),), guidance=2.0)
    assert "--adapter ./prime" in command_text(request)


def any_request(rng):
    """A request such as the page makes; and some that only the command line can make."""
    count = rng.choice((1, 1, 2, 3))
    number = lambda *choices: rng.choice((*choices, round(rng.uniform(0, 1), 3)))  # noqa: E731
    has_mask, has_exponent, has_balance = (rng.random() < 0.3 for _ in range(3))
    invert, max_megapixels = rng.choice((None, None, True, False)), rng.choice((64, 8.5))

    def control(place):
        start = number(0.0, 0.0)
        balance = rng.choice(BALANCE_NAMES) if has_balance else None
        file = rng.choice((f"map {place}.png", f"-{place}.png", "/tmp/ü.png"))
        return ControlRequest(
            rng.choice((MapSource, ImageSource))(file),
            condition_name=rng.choice(("canny", "sketch", "depth")),
            adapter=rng.choice(("prime", "slim", "./prime", "org/name")),
            scale=number(1.0, 0.0, -0.5, 1e-07, 2.0),
            start=start,
            end=rng.choice((1.0, round(rng.uniform(start, 1), 3))),
            policy=None if balance else rng.choice(POLICIES),
            balance=balance,
            level_scales=None if balance or count > 1 else rng.choice((None, (0.5, 1.0, -1.0, 1.25))),
            noise_exponent=number(0.0, 1.0) if has_exponent else None,
            mask=f"mask {place}.png" if has_mask else None,
            resize_mode=mode,
            invert=invert,
            max_megapixels=max_megapixels,
        )

    mode = rng.choice((None, *RESIZE_MODES))
    return GenerateRequest(
        prompt=rng.choice(("a ring", "", "-a", "--seed", 'it\'s "x" $HOME `y` \\n', "ü\nsecond line")),
        negative=rng.choice(("", "a cross", "-x")),
        controls=tuple(control(place) for place in range(count)),
        base=rng.choice((BaseRequest(), BaseRequest("org/sd", "folder", "v_prediction"))),
        loras=tuple(LoraRequest(f"lora{place}", number(1.0)) for place in range(rng.choice((0, 0, 2)))),
        device=rng.choice(("auto", "cpu")),
        dtype=rng.choice(("auto", "bfloat16")),
        scheduler=rng.choice((None, *SCHEDULERS)),
        steps=rng.choice((20, 1, 1000)),
        guidance=rng.choice((2.0, 7.5, 0.0, 3.25)),
        seed=rng.choice((0, 2**32 - 1, 7)),
        width=rng.choice((None, 512)),
        height=rng.choice((None, 768)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_command_parses_to_the_same_request(seed):
    rng, parser = random.Random(seed), build_parser()
    for _ in range(60):
        request = any_request(rng)
        arguments = command_line(request, "out.png")
        assert parse(parser.parse_args(arguments[1:])) == request, shlex.join(arguments)


def test_the_text_of_a_command_is_the_command():
    rng = random.Random(5)
    for _ in range(30):
        request = any_request(rng)
        adapters = [control.adapter for control in request.controls]
        if any(Path(file).name != file for file in files_of(request)) or "./prime" in adapters:
            continue
        text = command_text(request).replace("\\\n", " ")
        assert shlex.split(text) == command_line(request)
