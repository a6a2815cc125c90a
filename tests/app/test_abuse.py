"""A live server under abuse: ways to other files, requests that forge others, uploads, secrets."""

import json
import os
import socket
import struct
import threading
import zlib
from urllib.parse import quote

import pytest
from tests.app.live import API, META, SECRET, file_of, live_app, png


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with live_app(tmp_path_factory) as app:
        yield app


class Canary:
    """A server that must not be asked anything."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.asked = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.asked += 1
            connection.close()


def get_targets(app):
    """Ways out of the folder in a GET's target."""
    secret, files = str(app.folder / "secret.txt"), os.path.dirname(os.path.dirname(app.stored))
    up = "../" * 12
    yield from (
        f"{API}/file={path}" for path in (secret, "/etc/passwd", "//etc/passwd", "/proc/self/environ")
    )
    yield from (f"{API}/file={path}" for path in (f"{up}etc/passwd", "~root/.bashrc", "etc/passwd", "."))
    yield from (f"{API}/file={files}/{up}{path}" for path in ("etc/passwd", secret.lstrip("/")))
    yield from (
        f"{API}/file={files}/{path}" for path in ("..%2f..%2fsecret", "%2e%2e/%2e%2e/x", "%252e%252e/x")
    )
    yield from (
        f"{API}/file={path}" for path in (files, "/etc/passwd%00.png", "/etc/./passwd", "..%5c..%5cx")
    )
    yield from (
        f"{API}/file={scheme}" for scheme in ("file:///etc/passwd", "file:/etc/passwd", "C:/secret.txt")
    )
    yield from (f"{API}/file/{path}" for path in ("etc/passwd", f"{up}etc/passwd", secret.lstrip("/")))
    yield from (f"/{kind}/{up}etc/passwd" for kind in ("assets", "static", "svelte"))
    yield from (f"/{kind}/..%2f..%2froutes.py" for kind in ("assets", "static", "svelte"))
    yield from (f"/{kind}/%2e%2e/%2e%2e/routes.py" for kind in ("assets", "static"))
    yield from ("/assets/..%5c..%5croutes.py", "/static/.hidden", f"/{up}etc/passwd", "//etc/passwd")
    yield f"{API}/custom_component/x/client/component/../../../image.py"
    yield f"{API}/stream/a/b/1/../../../secret"


def test_no_get_leaves_the_folder(app):
    targets = list(get_targets(app))
    assert len(targets) >= 30
    for target in targets:
        status, body = app.raw("GET", target)
        assert 400 <= status < 500, target
        assert not any(text in body for text in (SECRET, "root:", "import ")), target


def test_no_event_reads_a_file_that_was_not_stored_here(app):
    files = os.path.dirname(os.path.dirname(app.stored))
    link = os.path.join(files, "link.png")
    os.symlink(app.folder / "secret.txt", link)
    secret = app.folder / "secret.txt"
    paths = [
        secret,
        link,
        f"{files}/../../{secret}",
        f"{files}/{'../' * 12}etc/passwd",
        "/etc/passwd",
        files,
        "",
    ]
    paths += [
        "/proc/self/environ",
        "/dev/zero",
        "~/.bashrc",
        "red.png",
        "\x00",
        f"{app.stored}\x00",
        "/",
        "//",
        ".",
    ]
    before = sorted(os.listdir(files))
    for path in paths:
        for picture in (file_of(path), {"path": str(path)}, [file_of(path)], {"a": {"b": [file_of(path)]}}):
            assert app.join(app.event(picture)).status_code == 400, picture
    for path in (7, None, [app.stored], {"path": app.stored}):
        assert app.join(app.event({"path": path, "meta": META})).status_code == 400, path
    assert sorted(os.listdir(files)) == before


def test_an_upload_stays_in_its_folder_whatever_its_name(app):
    files = os.path.dirname(os.path.dirname(app.stored))
    for name in (
        "../../x.png",
        "/etc/x.png",
        "..\\..\\x.png",
        "a/../../x.png",
        "x\x00.png",
        ".",
        "con",
        "x.html",
    ):
        answer = app.client.post(f"{API}/upload", files={"files": (name, png())})
        if answer.status_code == 200:
            (stored,) = answer.json()
            assert os.path.dirname(os.path.dirname(os.path.realpath(stored))) == files, name
            sent = app.client.get(f"{API}/file={quote(stored)}")
            assert sent.headers["content-type"].startswith(("image/png", "application/octet-stream")), name
            assert "sandbox" in sent.headers["content-security-policy"]
            assert sent.headers["x-content-type-options"] == "nosniff"
        else:
            assert 400 <= answer.status_code < 500, name


def forgeries(app, port):
    """Requests that would make the server ask another one: (method, target, body, headers)."""
    url = f"http://127.0.0.1:{port}/x.png"
    json_type = ("Content-Type", "application/json")

    def post(target, value, *headers):
        return "POST", f"{API}/{target}", json.dumps(value).encode(), [json_type, *headers]

    urls = (url, url.replace("http:", "https:"), f"//127.0.0.1:{port}/x.png", url.replace("http", "HTTP"))
    for each in urls:
        yield post("queue/join", app.event(file_of(each)))
        yield post("queue/join", app.event({"url": each, "meta": META}))
    yield post("queue/join", app.event({"path": None, "url": url, "meta": META}))
    yield post("queue/join", app.event({"path": f"{API}/file={url}", "url": url, "meta": META}))
    yield post("queue/join", app.event({"nested": [{"url": url}]}))
    yield post("queue/join", app.event(None, event_data={"value": file_of(url)}))
    yield post("call/generate", {"data": ["a", file_of(url), 0.5, 1, []]})
    yield post("call/v2/generate", {"prompt": "a", "picture": file_of(url)})
    yield post("run/refresh", {"fn_index": 1, "data": [file_of(url)]})
    yield post("component_server", {"data": url, "component_id": 1, "fn_name": "load", "session_hash": "a"})
    yield post("run-history/connect", {"bucket": url})
    yield post("process_recording", {"url": url})
    yield post("vibe-edit", {"prompt": url})
    yield post("upload", {"files": [url]})
    for target in (
        f"proxy={url}",
        f"file={url}",
        f"file/{url}",
        f"file={urls[2]}",
        f"stream/{url}/a/1/playlist.m3u8",
    ):
        yield "GET", f"{API}/{target}", None, []
    yield "HEAD", f"{API}/proxy={url}", None, []
    yield "GET", url, None, []  # as to a proxy
    yield "CONNECT", f"127.0.0.1:{port}", None, []
    good = app.event()
    for host in (
        "evil.example",
        f"127.0.0.1.evil.example:{port}",
        "",
        "localhost:x",
        f"localhost@{app.host}",
    ):
        yield (*post("queue/join", good, ("Host", host)),)
    for origin in (
        "http://evil.example",
        f"http://127.0.0.1:{port}",
        "null",
        f"http://{app.host}.evil.example",
    ):
        yield post("queue/join", good, ("Origin", origin))
    yield post("queue/join", good, ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "cors"))
    yield "POST", f"{API}/queue/join", json.dumps(good).encode(), [("Content-Type", "text/plain")]
    yield "OPTIONS", f"{API}/queue/join", None, [("Origin", "http://evil.example")]


def test_no_request_makes_the_server_ask_another(app):
    canary = Canary()
    requests = list(forgeries(app, canary.port))
    assert len(requests) >= 30
    for method, target, body, headers in requests:
        status, said = app.raw(method, target, body, headers)
        assert 400 <= status < 500, (method, target, body, headers)
        assert str(canary.port) not in said
    # With a stored file next to it, a URL is dropped.
    url = f"http://127.0.0.1:{canary.port}/x.png"
    assert app.join(app.event(file_of(app.stored, url=url), session="forged")).status_code == 200
    assert "process_completed" in app.result("forged")
    status, page = app.raw("GET", "/config", headers=[("X-Forwarded-Host", f"127.0.0.1:{canary.port}")])
    assert status == 200
    assert str(canary.port) not in page
    assert canary.asked == 0


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A tiny PNG file of many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
BAD_FILES = {
    "bomb.png": (bomb(60000, 60000), 415),
    "wide.png": (bomb(2**31 - 1, 1), 415),
    "page.png": (b"<html><script>alert(1)</script></html>", 415),
    "drawing.svg": (SVG, 415),
    "drawing.png": (SVG, 415),
    "empty.png": (b"", 415),
    "short.png": (png()[:20], 415),
    "program.jpg": (b"\x7fELF" + bytes(100), 415),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "pickle.png": (b"\x80\x04\x95cposix\nsystem\n.", 415),
    "huge.png": (png() + bytes(21 * 2**20), 413),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_upload_is_refused_in_one_line(app, name):
    content, status = BAD_FILES[name]
    answer = app.client.post(f"{API}/upload", files={"files": (name, content)})
    assert answer.status_code == status
    (line,) = answer.json()["error"].splitlines()
    assert line.startswith("image: expected")
    assert str(app.stored)[:12] not in line


def test_a_body_that_is_too_long_is_refused_while_it_arrives(app):
    def body():
        for _ in range(40):
            yield bytes(2**20)

    answer = app.client.post(
        f"{API}/queue/join", content=body(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_truncated_picture_is_stored_and_its_function_says_why(app):
    content = png((64, 64))[:-30]
    stored = app.client.post(f"{API}/upload", files={"files": ("cut.png", content)})
    assert stored.status_code in (200, 415)


def test_planted_secrets_appear_nowhere(app, caplog):
    assert app.join(app.event(session="fails", data=[None, "fail", None, 0.5, 1, []])).status_code == 200
    texts = [app.result("fails")]
    texts += [app.client.get(page).text for page in ("/", "/config", f"{API}/info", f"{API}/queue/status")]
    texts += [app.raw("GET", f"{API}/file={app.folder}/secret.txt")[1], caplog.text]
    for text in texts:
        assert SECRET not in text
        assert SECRET.replace("-", "") not in text
        assert str(app.folder) not in text
        assert "/srv/private" not in text
    assert "The server failed on this request" in texts[0]
    (line,) = [record.getMessage() for record in caplog.records if "generate failed" in record.getMessage()]
    assert "\n" not in line
    assert "model.safetensors" in line


def test_every_answer_has_the_security_headers(app):
    for target in ("/", "/nothing", f"{API}/info", f"{API}/file={app.stored}"):
        headers = app.client.get(target).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert "default-src 'self'" in (policy := headers["content-security-policy"]) or "sandbox" in policy
        assert "server" not in headers
