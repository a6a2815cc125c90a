"""Programs generate and extract through gradio's client, from a live server."""

import contextlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from nexus_adapters.app.models import Models
from nexus_adapters.app.page import build
from nexus_adapters.app.server import running
from nexus_adapters.conditions import extract
from nexus_adapters.generation.requests import ControlRequest, GenerateRequest, ImageSource
from nexus_adapters.generation.settings import read_settings

client_of = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def models(weights):
    return Models()


@pytest.fixture(scope="module")
def client(models):
    with running(lambda: build(models)) as address:
        client = client_of.Client(
            address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 300}
        )
        yield client
        with contextlib.suppress(Exception):
            client.close()


@pytest.fixture
def picture(tmp_path):
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((8, 8, 50, 50), fill="tomato")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_images_of_the_api_are_those_of_the_command(client, models, picture):
    files, settings = client.predict(
        prompt="a ring",
        image=client_of.handle_file(str(picture)),
        adapters=["Prime", "Slim"],
        scale=0.5,
        steps=2,
        seed=3,
        api_name="/generate",
    )
    assert len(files) == len(settings) == 2
    for file, made, adapter in zip(files, settings, ("prime", "slim"), strict=True):
        assert read_settings(file) == made
        assert (made["adapter"], made["seed"], made["scale"]) == (f"embedded {adapter}", 3, 0.5)
        control = ControlRequest(ImageSource(str(picture)), adapter=adapter, scale=0.5)
        request = GenerateRequest("a ring", (control,), models.guidance, steps=2, seed=3)
        assert (np.asarray(Image.open(file)) == np.asarray(models.generate(request).image)).all()


def test_maps_are_extracted(client, picture):
    file, settings = client.predict(
        image=client_of.handle_file(str(picture)), condition="sketch", api_name="/extract"
    )
    found = np.asarray(Image.open(file).convert("RGB"))
    assert (found == np.asarray(extract("sketch", Image.open(picture)))).all()
    assert settings["extractor"] == read_settings(file)["extractor"] == "sketch"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1000}, "steps"),
        ({"scale": None}, "scale"),
        ({"width": 4096, "height": 4096}, "width and height"),
        ({"start": 0.5, "end": 0.1}, "end"),
        ({"adapters": []}, "adapters"),
        ({"is_map": False, "condition": "depth"}, "is_map"),
    ],
)
def test_bad_values_are_named_in_one_line(values, name, client, picture):
    with pytest.raises(client_of.exceptions.AppError) as error:
        client.predict(
            prompt="a ring", image=client_of.handle_file(str(picture)), **values, api_name="/generate"
        )
    text = str(error.value)
    assert name in text.partition(":")[0]
    assert len(text.splitlines()) == 1


def test_the_page_itself_is_no_endpoint(client):
    described = client.view_api(return_format="dict", print_info=False)
    assert set(described["named_endpoints"]) == {"/generate", "/extract"}
    assert described["unnamed_endpoints"] == {}
