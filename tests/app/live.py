"""A live stand-in page and what tests of abuse send to it."""

import http.client
import io
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image
from tests.app import stand_in

from nexus_adapters.app.server import running

SECRET = "hunter2-planted-secret"
API = "/gradio_api"
META = {"_type": "gradio.FileData"}


def png(size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return stream.getvalue()


def file_of(path, **more):
    return {"path": str(path), "meta": META} | more


class App:
    """The address of a live stand-in page, and requests to it."""

    def __init__(self, address, folder):
        self.address, self.folder = address, folder
        self.host = address.removeprefix("http://")
        self.client = httpx.Client(base_url=address, timeout=30)
        self.stored = self.client.post(f"{API}/upload", files={"files": ("red.png", png())}).json()[0]

    def raw(self, method, target, body=None, headers=()):
        """Send a target as it is, which httpx would normalize."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.putrequest(method, target, skip_host=any(k == "Host" for k, _ in headers))
            for name, value in headers:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def event(self, picture=None, session="tests", **changes):
        data = [None, "a cat", picture, 0.5, 1, ["Prime"]]
        return {"fn_index": 0, "session_hash": session, "data": data} | changes

    def join(self, event):
        return self.client.post(f"{API}/queue/join", json=event)

    def result(self, session):
        """Return all that the server says about a session's events."""
        return self.client.get(f"{API}/queue/data", params={"session_hash": session}).text


@contextmanager
def live_app(tmp_path_factory):
    """Serve the stand-in page, with secrets in the environment and in a file next to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", f"hf_{SECRET.replace('-', '')}")
        patch.setenv("SOME_PASSWORD", SECRET)
        folder = tmp_path_factory.mktemp("private")
        (folder / "secret.txt").write_text(SECRET)
        with running(stand_in.build, max_queue=64) as address:
            yield App(address, folder)
