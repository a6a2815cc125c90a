"""JSON bodies and values of components, checked before gradio sees them."""

import gradio as gr
import pytest

from nexus_adapters.app.answers import Refused
from nexus_adapters.app.payloads import DEEPEST, fits, parse

JSON = "application/json"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_an_object_is_read(kind):
    assert parse(b'{"a": [1, 2.5, "\xc3\xa9", null]}', kind) == {"a": [1, 2.5, "é", None]}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"{}", "", 415),
        (b"", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"a": NaN}', JSON, 400),
        (b'{"a": 1e999}', JSON, 400),
        (b'{"a": 123456789012345678901}', JSON, 400),
        (b'{"a": "\\ud800"}', JSON, 400),
        (b'{"\\ud800": 1}', JSON, 400),
        (b'{"a": "\xff"}', JSON, 400),
        (b'{"a": ' + b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1) + b"}", JSON, 400),
        (b'{"a": [' + b"0," * 10_000 + b"0]}", JSON, 400),
    ],
)
def test_what_no_function_takes_is_refused(body, kind, status):
    with pytest.raises(Refused) as caught:
        parse(body, kind)
    assert caught.value.status == status


with gr.Blocks(analytics_enabled=False):
    TEXT, NUMBER, BOX = gr.Textbox(), gr.Slider(0, 1), gr.Checkbox()
    LIST, FILE, HTML, ANY = gr.CheckboxGroup(["a"]), gr.File(), gr.HTML(), gr.JSON()
STORED = {"path": "x.png", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("block", "good", "bad"),
    [
        (TEXT, ["", "a"], [1, True, [], {}]),
        (NUMBER, [0, 0.5], ["1", True, []]),
        (BOX, [True, False], [1, "true"]),
        (LIST, [[], ["a"]], ["a", 1, {}]),
        (FILE, [STORED], ["x.png", {"path": 1}, [1]]),
        (HTML, ["a", {"image": None}], [1, []]),
        (ANY, [1, "a", [], {}], []),
    ],
)
def test_values_fit_their_components(block, good, bad):
    assert all(fits(value, block) for value in good)
    assert not any(fits(value, block) for value in bad)
