"""Words of a prompt that the embedded base was not trained on are reported, whatever pipeline reads them."""

import copy
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from transformers import CLIPTokenizer

from nexus_adapters.bases.vocabulary import warn_of_unknown_words
from nexus_adapters.bundled import BUNDLED
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.scene import COLORS, MATERIALS, SHAPES, SPLITS, draw_scene

EMBEDDED = BUNDLED["embedded"]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(EMBEDDED.folder / "tokenizer")


@pytest.fixture
def encode(tokenizer):
    """Encodes a prompt by a pipeline whose text encoder has no weights."""
    encoder = torch.nn.Module()
    encoder.forward = lambda input_ids, **_: input_ids
    warn_of_unknown_words(
        SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder), "embedded", EMBEDDED.words
    )
    return lambda *prompts: encoder(
        tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids, attention_mask=None
    )


def test_the_words_are_those_of_the_captions():
    assert EMBEDDED.words["shapes"] == SHAPES
    assert EMBEDDED.words["colors"] == tuple(COLORS)
    assert EMBEDDED.words["materials"] == MATERIALS
    listed = {word for group in EMBEDDED.words.values() for phrase in group for word in phrase.split()}
    scenes = [draw_scene(seed, split) for split in SPLITS for seed in range(100)]
    captions = {caption(scene, phrasing) for scene in scenes for phrasing in range(5)}
    assert listed == {word for sentence in captions for word in re.findall(r"\w+", sentence)}


def test_unknown_words_are_named_once_with_the_known_ones(encode):
    with pytest.warns(UserWarning, match="embedded") as caught:
        encode("a big house, a Red house and a CAFÉ", "", "a blue cow on a road by a lake with 2 trees")
    (warning,) = caught
    assert "'big', 'house', 'café', 'cow', 'road', ..." in str(warning.message)
    assert "crescent" in str(warning.message)
    assert "torch" not in Path(warning.filename).parts  # the line of whoever asked, not of what calls hooks


@pytest.mark.parametrize(
    "prompt", ["", "A picture of a dotted RED star, and a ring. The background is blue!"]
)
def test_nothing_is_said_of_known_words(encode, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(prompt)


def test_stock_pipelines_with_the_same_parts_warn_and_can_be_copied():
    pipe = tiny.quiet(tiny.sd15())
    warn_of_unknown_words(pipe, "tiny", {"words": ("red", "star")})
    sibling = copy.deepcopy(tiny.quiet(type(pipe)(**pipe.components, requires_safety_checker=False)))
    with pytest.warns(UserWarning, match=r"'tiny' does not know .*'blue'\. It knows words: red, star"):
        sibling("red blue star", num_inference_steps=1)
