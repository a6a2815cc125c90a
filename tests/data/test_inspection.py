import logging

import pytest
from tests import tiny
from tests.data.image_files import picture

from nexus_adapters.bases.families import base_of
from nexus_adapters.bases.loading import BaseSource
from nexus_adapters.bases.tokens import find_tokenizer, token_counts, token_limit, truncation_unlogged
from nexus_adapters.data.inspection import caption_lengths, describe_captions, inspect
from nexus_adapters.data.samples import BadSample, Sample
from nexus_adapters.embedded.scene_source import SceneSource

LONG = " ".join(["a red star on a blue ring"] * 3)  # 21 words, where 12 tokens are read


@pytest.mark.parametrize("caption", ["a cat \ud800", "\udfff", "\ude00\ud83d", "ok \udcff"])
def test_a_caption_that_is_no_unicode_text_is_a_bad_sample(caption):
    with pytest.raises(BadSample, match=r"^captions: .*'the sample'") as caught:
        Sample("the sample", picture(), None, ("fine", caption))
    str(caught.value).encode()


@pytest.mark.parametrize("caption", ["", "a cat", "\U0001f600", "Blüte", "a\0b"])
def test_all_other_captions_are_taken(caption):
    assert Sample("x", picture(), None, (caption,)).captions == (caption,)


def test_lengths_are_those_that_the_base_reads_and_cuts():
    tokenizer = tiny.tokenizer()
    assert token_limit(tokenizer) == 12
    assert token_counts(tokenizer, ["a red star", LONG]) == [5, 23]
    assert token_counts(tokenizer, []) == []
    assert caption_lengths(["a red star", " ", LONG, ""], tokenizer) == [5, 0, 23, 0]
    assert caption_lengths(["a red star", "\n"], None) == [-1, 0]


@pytest.mark.parametrize(
    ("lengths", "shown"),
    [
        ([[5], [12, 3], [-1]], []),
        ([[0], [5], [0, 0], [0, 5]], ["2 of 4"]),
        ([[0], [0]], ["2 of 2"]),
        ([[13], [12], [5, 40], [-1], [0, 5]], ["2 of 5"]),
        ([[0], [13]], ["1 of 2", "1 of 2"]),
        ([], []),
    ],
)
def test_a_line_for_each_kind_of_caption(lengths, shown):
    lines = describe_captions(lengths, tiny.tokenizer())
    assert len(lines) == len(shown)
    assert all(counts in line for counts, line in zip(shown, lines, strict=True))
    assert not [line for line in describe_captions(lengths, None) if "tokens" in line]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_encoding_logs_nothing_of_what_it_cuts_and_all_else_is_logged(family):
    pipe = getattr(tiny, family)()
    logger = logging.getLogger(type(pipe).encode_prompt.__module__)
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger.addHandler(handler)
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    try:
        with truncation_unlogged(pipe):
            pipe.encode_prompt(LONG, **arguments)
            logger.warning("something else")
        assert logged == ["something else"]
        pipe.encode_prompt(LONG, **arguments)
        assert len(logged) > 1  # as before
        del logged[:]
        base_of(pipe)[0].encode_prompts([LONG])
        assert logged == []
    finally:
        logger.removeHandler(handler)


def test_the_tokenizer_of_a_base_is_found_where_it_is_on_this_machine(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert token_counts(find_tokenizer(BaseSource(str(tmp_path))), ["a red star"]) == [5]
    assert find_tokenizer(BaseSource("somebody/never-fetched")) is None
    assert find_tokenizer(BaseSource(str(tmp_path / "tokenizer"))) is None


class Looked(SceneSource):
    """Scenes of which every seventh cannot be read."""

    ignored = "2 captions without an image (a.txt, b.txt)"

    def load(self, index):
        if index % 7 == 0:
            raise BadSample(f"image: {index} is damaged")
        return Sample(self.key(index), picture(0, 32, 16), None, ("a cat",))


@pytest.mark.parametrize(("count", "looked_at"), [(20, 20), (1000, 1000), (1003, 1000), (40_000, 1000)])
def test_large_data_are_looked_at_all_over(count, looked_at):
    source = Looked(count)
    seen = []

    def load(index):
        seen.append(index)
        return source.load(index)

    found = inspect(source, range(count), load, lambda size: (32, 32))
    assert (found.samples, found.looked_at, len(seen)) == (count, looked_at, looked_at)
    assert seen == sorted(set(seen))
    assert seen[0] < count / looked_at
    assert seen[-1] >= count - 1 - count / looked_at
    assert found.small == len(found.lengths) == looked_at - len(found.left_out) > 0
    lines = found.describe()
    assert ("evenly spaced" in lines[0]) == (count > looked_at)
    assert any("captions without an image (a.txt, b.txt)" in line for line in lines)
    assert any(f"{len(found.left_out)} of" in line.replace(",", "") and "image" in line for line in lines)


def test_names_that_utf8_cannot_say_are_shown(tmp_path):
    def load(index):
        raise BadSample("image: expected an image, got 'folder/\udcff.png'")

    lines = inspect(Looked(2), range(2), load, lambda size: size).describe()
    assert "folder/\ufffd.png" in "\n".join(lines).encode().decode()
