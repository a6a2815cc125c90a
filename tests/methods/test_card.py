"""The code in a model card: the guidance scale of an embedded base, and nothing about that of others."""

import ast

import pytest
from torch import nn

from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.methods import known_methods


def guidance_in(code):
    """The guidance scale of the only call of `pipe`; None without one."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe"]
    return {word.arg: word.value.value for word in call.keywords if word.arg != "image"}.get("guidance_scale")


@pytest.mark.parametrize("method", known_methods(), ids=lambda method: method.name)
def test_the_card_has_the_guidance_scale_of_an_embedded_base(method):
    for base, scale in ((EMBEDDED, BUNDLED[EMBEDDED].guidance_scale), ("someone/base", None)):
        assert guidance_in(method.card(nn.Module(), base, "path/to/adapter")) == scale
