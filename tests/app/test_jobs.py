"""Generations end within a step when they are cancelled, and sessions do not affect one another."""

import asyncio
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tests.app.pages import drawn

from nexus_adapters.app.form import ControlForm, Form
from nexus_adapters.app.jobs import Ended, Finished, Job, Progress
from nexus_adapters.app.models import Models
from nexus_adapters.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("weights")


def requests_of(models, folder, steps=2, seed=0, prompt="a ring", names=("Prime", "Slim")):
    image = Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(image).ellipse((8, 8, 50, 50), fill="tomato")
    folder.mkdir()
    request = Form((ControlForm(drawn(image)),), prompt=prompt, steps=steps, seed=seed).request(
        models, folder
    )
    return [each for _, each in models.requests(request, names)]


def events_of(job, until=None):
    async def collect():
        found = []
        async for event in job.events():
            found.append(event)
            if until is not None and until(event):
                job.cancel()
        return found

    return asyncio.run(collect())


def images_of(events):
    return [np.asarray(event.generated.image) for event in events if isinstance(event, Finished)]


@pytest.fixture(scope="module")
def models(weights):
    return Models()


def test_steps_are_reported_and_images_follow(models, tmp_path):
    requests = requests_of(models, tmp_path / "a")
    events = events_of(Job(models, requests))
    assert isinstance(events[-1], Ended)
    assert (events[-1].error, events[-1].is_cancelled) == (None, False)
    for place, request in enumerate(requests):
        steps = [event.index for event in events if isinstance(event, Progress) and event.place == place]
        assert steps == sorted(steps)
        assert set(steps) <= set(range(request.steps + 1))
        expected = np.asarray(models.generate(request).image)
        assert (images_of(events)[place] == expected).all()
    previews = [event.preview for event in events if isinstance(event, Progress) and event.preview]
    assert previews
    assert max(max(preview.size) for preview in previews) <= 256


def test_a_cancelled_generation_ends_within_a_step_and_changes_nothing(models, tmp_path):
    (request,) = requests_of(models, tmp_path / "a", steps=30, names=["Slim"])
    called = []
    generate = Models.generate

    class Counting(Models):
        def generate(self, request, on_step=None):
            def counted(step):
                called.append(step.index)
                on_step(step)

            return generate(models, request, counted)

    job = Job(Counting(), [request, request])
    events = events_of(job, until=lambda event: isinstance(event, Progress) and event.index >= 3)
    assert events[-1] == Ended(is_cancelled=True)
    assert images_of(events) == []
    # The step that ran when it was cancelled, and those that ran before the cancelling thread got its turn.
    assert len(called) < 30
    (again,) = requests_of(models, tmp_path / "b", steps=2, names=["Slim"])
    serial = np.asarray(Models().generate(again).image)
    assert (np.asarray(models.generate(again).image) == serial).all()


def test_a_job_that_is_cancelled_before_its_turn_generates_nothing(models, tmp_path):
    job = Job(models, requests_of(models, tmp_path / "a"))
    job.cancel()
    assert events_of(job) == [Ended(is_cancelled=True)]


def test_two_sessions_at_once_get_their_own_images(models, tmp_path):
    jobs = [requests_of(models, tmp_path / str(seed), seed=seed, names=["Slim"]) for seed in range(2)]
    serial = [[np.asarray(models.generate(request).image) for request in requests] for requests in jobs]
    found = [None, None]

    def run(place):
        found[place] = images_of(events_of(Job(models, jobs[place])))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        (a == b).all()
        for one, other in zip(found, serial, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert not (found[0][0] == found[1][0]).all()


def test_an_error_is_the_last_event(models, tmp_path):
    (request,) = requests_of(models, tmp_path / "a", names=["Slim"])
    (tmp_path / "a" / "picture.png").write_bytes(b"no image")
    (event,) = [event for event in events_of(Job(models, [request])) if isinstance(event, Ended)]
    assert isinstance(event.error, InvalidArgument)
    assert event.error.name == "image"
