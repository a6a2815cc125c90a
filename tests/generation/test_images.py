import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tests import tiny
from tests.methods.built import build
from tests.weights import use_weights

from nexus_adapters.adapter.saved import find_saved
from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.generation.images import generate_image, prepare
from nexus_adapters.generation.models import load_model
from nexus_adapters.generation.requests import SCHEDULERS, ControlRequest, GenerateRequest, MapSource


@pytest.fixture(scope="module")
def model(tiny_weights):
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, tiny_weights)
        model = load_model(BaseSource(), [find_saved("prime")], torch.float32)
        tiny.quiet(model.pipe)
        yield model


@pytest.fixture
def request_for(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[10:50:12, 10:50] = 255
    Image.fromarray(pixels).save(tmp_path / "map.png")

    def request_for(**values):
        control = ControlRequest(MapSource(str(tmp_path / "map.png")))
        return GenerateRequest("a red star", (control,), guidance=3.0, **{"steps": 3} | values)

    return request_for


def pixels_of(*args):
    return np.asarray(generate_image(*args))


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_previews_do_not_change_the_image(model, request_for, scheduler):
    prepared = prepare(request_for(scheduler=scheduler, steps=4), model)  # PNDM takes no fewer
    plain = pixels_of(model, prepared, 4)
    seen, previews = [], []

    def on_step(step):
        seen.append((step.index, step.total))
        previews.append(step.preview())

    assert np.array_equal(pixels_of(model, prepared, 4, on_step), plain)
    total = len(prepared.scheduler.timesteps)
    assert seen == [(index, total) for index in range(1, total + 1)]
    assert {preview.size for preview in previews} == {(64, 64)}
    # What is predicted in the last step is the image; the more so, the less noise that step leaves.
    assert np.abs(np.asarray(previews[-1]).astype(int) - plain).mean() < 12
    assert np.array_equal(pixels_of(model, prepared, 4), plain)


class CanceledError(Exception):
    pass


def test_a_canceled_generation_leaves_nothing_behind(model, request_for):
    prepared = prepare(request_for(), model)
    plain = pixels_of(model, prepared, 4)

    def cancel(step):
        if step.index == 2:
            raise CanceledError

    with pytest.raises(CanceledError):
        generate_image(model, prepared, 4, cancel)
    assert not model.pipe.unet._forward_pre_hooks
    assert "step" not in vars(prepared.scheduler)
    assert np.array_equal(pixels_of(model, prepared, 4), plain)


def test_a_request_does_not_change_the_next_ones_scheduler(model, request_for):
    plain = pixels_of(model, prepare(request_for(), model), 4)
    other = pixels_of(model, prepare(request_for(scheduler="euler-a"), model), 4)
    assert not np.array_equal(other, plain)
    assert np.array_equal(pixels_of(model, prepare(request_for(), model), 4), plain)


@pytest.mark.parametrize("kind", ["controlnet", "controlnet-xs"])
def test_methods_with_their_own_pipelines_report_steps_and_can_be_canceled(
    model, request_for, tiny_weights, tmp_path, kind
):
    unet = UNet2DConditionModel.from_pretrained(tiny_weights / "base" / "unet")
    options = {"size_ratio": 1.0} if kind == "controlnet-xs" else {}
    build(kind, unet, **options).save_pretrained(tmp_path / "adapter")
    own = model.with_adapters([find_saved(tmp_path / "adapter")])
    prepared = prepare(request_for(), own)
    plain, seen = pixels_of(own, prepared, 4), []
    assert np.array_equal(pixels_of(own, prepared, 4, lambda step: seen.append(step.preview().size)), plain)
    assert seen == [(64, 64)] * 3

    def cancel(step):
        raise CanceledError

    with pytest.raises(CanceledError):
        generate_image(own, prepared, 4, cancel)
    assert np.array_equal(pixels_of(own, prepared, 4), plain)
