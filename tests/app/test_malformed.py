"""Malformed requests: each gets an answer in one line, and none makes the server fail."""

import collections
import json
import random

import pytest
from tests.app.live import API, SECRET, file_of, live_app, png


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with live_app(tmp_path_factory) as app:
        yield app


def mutated(app, rng):
    """A valid request, made invalid somewhere: (method, target, body, headers)."""
    event = app.event(file_of(app.stored))
    valid = [
        ("queue/join", event),
        ("run/refresh", {"fn_index": 1, "session_hash": "tests", "data": [{"image": None, "edited": False}]}),
        ("call/generate", {"data": ["a", file_of(app.stored), 0.5, 1, ["Slim"]]}),
        ("call/v2/generate", {"prompt": "a", "picture": None, "strength": 0.5, "seed": 1, "names": []}),
        ("cancel", {"session_hash": "tests", "fn_index": 0, "event_id": "abc"}),
        ("reset", {"event_id": "abc"}),
    ]
    target, value = rng.choice(valid)
    value = json.loads(json.dumps(value))
    kind = "application/json"
    how = rng.randrange(9)
    if how < 4:
        replace_somewhere(value, rng)
    body = json.dumps(value).encode()
    if how == 4:
        body = body[: rng.randrange(len(body))]
    elif how == 5:
        place = rng.randrange(len(body))
        body = body[:place] + rng.randbytes(rng.randrange(1, 9)) + body[place:]
    elif how == 6:
        kind = rng.choice(
            ["text/plain", "", "multipart/form-data", "application/x-www-form-urlencoded", "a/b; c=d"]
        )
    elif how == 7:
        target = rng.choice(
            ["upload", "queue/join", "run/" + "x" * rng.randrange(1, 99), "call/v2/none", "%ff", "queue"]
        )
    elif how == 8:
        target, kind = "upload", "multipart/form-data; boundary=xyz"
        body = rng.choice(
            [
                b"--xyz\r\n" + rng.randbytes(40),
                b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
                + png()[:50],
                b'--xyz\r\nContent-Disposition: form-data; name="files"\r\n\r\ntext\r\n--xyz--\r\n',
                b"--xyz--\r\n",
                b"",
                b"--xyz\r\nContent-Disposition: form-data\r\n\r\n\r\n--xyz--\r\n",
                b"\r\n" * 50,
            ]
        )
    method = rng.choice(["POST"] * 9 + ["GET", "PUT", "DELETE"])
    return method, f"{API}/{target}", body, [("Content-Type", kind)]


WRONG = [
    None, True, -1, 1e308, 10**30, "", "x" * 5000, "\ud800", "\x00", [], {}, [[]], {"path": "/etc/passwd"},
    "NaN", {"url": "http://127.0.0.1:9"}, [None] * 99, {"__proto__": 1}, "../../etc/passwd", "<script>", 0.1,
]  # fmt: skip


def replace_somewhere(value, rng):
    """Replace, delete or add one value inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        action = rng.random()
        if action < 0.2:
            del value[key]
        elif action < 0.3 and isinstance(value, list):
            value.append(rng.choice(WRONG))
        elif action < 0.4:
            deep = []
            for _ in range(rng.randrange(20, 3000)):
                deep = [deep]
            value[key] = rng.choice(WRONG)
        else:
            value[key] = rng.choice(WRONG)
        return


def send_malformed(app, count, seed):
    """Send mutated requests and return how often each status was the answer."""
    rng = random.Random(seed)
    counts = collections.Counter()
    for _ in range(count):
        method, target, body, headers = mutated(app, rng)
        answer = app.client.request(method, target, content=body, headers=headers)
        counts[answer.status_code] += 1
        assert answer.status_code < 500, (method, target, body[:300], answer.text)
        assert "Traceback" not in answer.text
        assert SECRET not in answer.text
        if answer.status_code >= 400 and method != "HEAD":
            assert set(answer.json()) == {"error", "detail"}
        if "event_id" in answer.text and answer.status_code == 200:
            session = json.loads(body).get("session_hash") or answer.json()["event_id"]
            said = app.result(session)
            assert "Traceback" not in said
            assert SECRET not in said
    return counts


def test_malformed_requests_get_an_answer_without_a_traceback(app):
    counts = send_malformed(app, 200, seed=0)
    assert sum(counts[status] for status in counts if status >= 400) > 100


@pytest.mark.full
def test_thousands_of_malformed_requests(app, record_property):
    counts = send_malformed(app, 5000, seed=1)
    print(sorted(counts.items()))
    record_property("statuses", dict(counts))


def test_deeply_nested_json_is_refused(app):
    for body in (b"[" * 100_000, b'{"a":' * 50_000, b'{"data":' + b"[" * 60 + b"]" * 60 + b"}"):
        answer = app.client.post(
            f"{API}/queue/join", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
