"""A base of which a part is missing, or does not belong, is refused by name before anything is generated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.refusals import refused

from nexus_adapters.bases import base_of, load_base, open_base
from nexus_adapters.bases.parts import check_text, file_variant, weight_files

TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


def remove(folder, *names):
    for name in names:
        (folder / name).unlink(missing_ok=True)


def write_slow_tokenizer(folder, *names):
    """The vocabulary in two files, as tokenizers were saved before tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab, merges = content["vocab"], content["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    written = {"vocab.json": json.dumps(vocab), "merges.txt": "\n".join(["#version: 0.2", *lines])}
    for name in names:
        (folder / name).write_text(written[name])


@pytest.mark.parametrize("load", [open_base, load_base])
class TestFolders:
    """Refused by the configs alone, and so also in a dry run."""

    def test_no_tokenizer_files(self, folder, load):
        remove(folder / "tokenizer", *TOKENIZER)
        with refused("base", str(folder / "tokenizer"), expected="tokenizer.json"):
            load(folder)

    @tiny.writes_fast_tokenizers
    def test_only_a_vocabulary(self, folder, load):
        write_slow_tokenizer(folder / "tokenizer", "vocab.json")
        remove(folder / "tokenizer", "tokenizer.json", "merges.txt")
        with refused("base", "vocab.json", expected="vocab.json and merges.txt"):
            load(folder)

    def test_an_empty_tokenizer_folder(self, folder, load):
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
        with refused("base", "no files", expected="tokenizer"):
            load(folder)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    def test_a_missing_part(self, folder, load, part):
        shutil.rmtree(folder / part)
        with refused("base", str(folder), expected=f"including {part}"):
            load(folder)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_missing_weights(self, folder, load, part):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        with refused("base", "config.json", expected=f"weights of the {part}"):
            load(folder)

    def test_parts_that_are_not_needed(self, folder, load):
        index = json.loads((folder / "model_index.json").read_text())
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        (folder / "model_index.json").write_text(json.dumps(index))
        if load is open_base:
            load(folder)
        else:
            load(folder, image_encoder=None)


@tiny.writes_fast_tokenizers
def test_a_vocabulary_in_two_files(folder):
    expected = load_base(folder).tokenizer("a red star").input_ids
    write_slow_tokenizer(folder / "tokenizer", "vocab.json", "merges.txt")
    remove(folder / "tokenizer", "tokenizer.json")
    assert load_base(folder).tokenizer("a red star").input_ids == expected


def small_tokenizer(count):
    """Its parent's first tokens."""
    ids = dict(sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])[:count])
    return tiny.clip_tokenizer(ids)


def test_a_tokenizer_of_another_size(save):
    whole = len(tiny.tokenizer())
    folder = save(tokenizer=small_tokenizer(14))
    for opened in (open_base, load_base):  # from the files alone, before any weights are read
        with refused("base", "14", expected=f"tokenizer with {whole}"):
            opened(folder)
    pipe = tiny.sd15(tokenizer=small_tokenizer(14))  # which has no files
    with refused("base", "14", expected=f"tokenizer with {whole}"):
        check_text(base_of(pipe)[0], "a pipeline")


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder", "vae", "scheduler"])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_a_part_that_the_index_does_not_have(save, name, how):
    folder = Path(save())
    index = json.loads((folder / "model_index.json").read_text())
    if how == "null":
        index[name] = [None, None]
    else:
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with refused("base", str(folder), expected=name):
        open_base(folder)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_scheduler_that_cannot_be_read(save, content):
    file = Path(save()) / "scheduler" / "scheduler_config.json"
    file.unlink() if content is None else file.write_text(content)
    with refused("base"):
        open_base(file.parents[1])


def test_a_tokenizer_that_is_too_large(save):
    """Its last tokens would be read past the text encoder's embeddings."""
    larger = tiny.tokenizer()
    larger.add_tokens(["purple"])
    with refused("base", str(len(larger)), expected=f"tokenizer with {len(larger) - 1}"):
        load_base(save(tokenizer=larger))


def test_the_second_tokenizer_of_sdxl(save):
    with refused("base", "14", expected="tokenizer_2"):
        load_base(save(tiny.sdxl, tokenizer_2=small_tokenizer(14)))


def embedding(encoder):
    return encoder.get_input_embeddings().weight


def test_a_text_encoder_that_reads_nothing(save):
    encoder = tiny.text_encoder()
    with torch.no_grad():
        embedding(encoder).fill_(0.1)
    with refused("base", "the same embeddings", expected="text encoder"):
        load_base(save(text_encoder=encoder))


def test_a_vocabulary_without_words(save):
    """Without two prompts of its own words that differ, nothing is said of the text encoder."""
    digits = [*"0123456789", *(f"{digit}</w>" for digit in "0123456789")]
    ids = {token: index for index, token in enumerate(("<|startoftext|>", "<|endoftext|>", *digits))}
    encoder = tiny.text_encoder()
    encoder.resize_token_embeddings(len(ids))
    tokenizer = tiny.clip_tokenizer(ids)
    load_base(save(tokenizer=tokenizer, text_encoder=encoder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(save, value):
    encoder = tiny.text_encoder()
    with torch.no_grad():
        next(p for n, p in encoder.named_parameters() if n.endswith("fc1.weight")).fill_(value)
    with refused("base", "changed", expected="finite"):
        load_base(save(text_encoder=encoder))


def test_which_weights_are_read(tmp_path):
    assert weight_files(tmp_path) == []
    assert file_variant(tmp_path) is None

    def add(*names):
        for name in names:
            (tmp_path / f"diffusion_pytorch_model.{name}").touch()

    def found(variant=None):
        return [
            file.name.removeprefix("diffusion_pytorch_model.") for file in weight_files(tmp_path, variant)
        ]

    add("fp16.safetensors")
    assert (found(), found("fp16"), file_variant(tmp_path)) == ([], ["fp16.safetensors"], "fp16")
    add("bin")
    assert (found(), file_variant(tmp_path)) == (["bin"], None)
    add("safetensors")
    assert (found(), found("fp16")) == (["safetensors"], ["fp16.safetensors"])


def test_weights_in_several_files(tmp_path):
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path)] == names
    assert file_variant(tmp_path) is None
