"""Errors become one line, without folders or secrets."""

import asyncio

import gradio as gr
import pytest

from nexus_adapters.app.failures import FAILED, private, report_errors
from nexus_adapters.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'/srv/secret place/base', which is corrupt", "'base', which is corrupt"),
        ("no such file: /srv/secret/base.safetensors", "no such file: base.safetensors"),
        (r"'C:\Users\me\base.png' is empty", "'base.png' is empty"),
        ("token hf_abcdefghijkl is invalid", "token *** is invalid"),
        ("password is tests-only-secret!", "password is ***!"),
        (
            "expected 1/2 and and/or, see https://example.org/a/b",
            "expected 1/2 and and/or, see https://example.org/a/b",
        ),
    ],
)
def test_private_parts_are_left_out(monkeypatch, text, expected):
    monkeypatch.setenv("MY_PASSWORD", "tests-only-secret")
    assert private(text) == expected


@pytest.mark.parametrize(
    ("error", "message", "is_logged"),
    [
        (InvalidArgument("steps", "at least 1", 0), "steps: expected at least 1, got 0", False),
        (gr.Error("Draw something first"), "Draw something first", False),
        (KeyError("x"), FAILED, True),
    ],
)
def test_every_error_of_a_function_is_one_line(caplog, error, message, is_logged):
    def fail():
        raise error

    with gr.Blocks(analytics_enabled=False) as page:
        gr.Button().click(fail)
    report_errors(page)
    with pytest.raises(gr.Error) as caught:
        asyncio.run(page.process_api(0, []))
    assert caught.value.message == message
    assert not caught.value.print_exception
    assert len(caplog.records) == is_logged
