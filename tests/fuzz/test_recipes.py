"""Recipes, evaluations and plans at random, seeded: each is a config or one error that names a key."""

import copy
import json
import random
from contextlib import suppress

import pytest
from tomli_w import dumps

from nexus_adapters.errors import InvalidArgument, shown
from nexus_adapters.evaluation.config import EvaluationRecipe, with_defaults
from nexus_adapters.study.plan import Study, StudyPlan
from nexus_adapters.training.config import TrainConfig
from nexus_adapters.training.parsing import validated
from nexus_adapters.training.recipe import dump_config, load_recipe, parse_config, read_toml
from nexus_adapters.training.run_identity import identity

RECIPE = {
    "output_dir": "runs/x",
    "seed": 1,
    "base": {"path": "owner/base", "revision": "main"},
    "adapter": {"method": "prime", "residual": True, "heads": 8},
    "data": {
        "kind": "folder", "path": "images", "resolution": 64, "condition": "canny", "workers": 0,
        "extractor": {"low": 50, "high": 100.0}, "count": 0, "max_bad_fraction": 0.1,
    },
    "cache": {"enabled": True, "folder": "cache"},
    "loss": {"condition_dropout": 0.1, "prompt_dropout": 0.1, "timesteps": "cubic", "band": [0.0, 1.0]},
    "training": {"max_train_steps": 10, "batch_size": 2, "learning_rate": 1e-4, "optimizer": "adamw"},
    "checkpoint": {"every_steps": 2, "keep": 1},
    "validation": {"every_steps": 5, "samples": 2, "images": 1, "prompts": ["a cat"]},
    "log": {"every_steps": 1, "trackers": []},
    "hub": {"repo_id": "", "private": True},
}  # fmt: skip
EVALUATION = {
    "first": 0,
    "prompts": "own",
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "policy": "positive",
    "judge": {"model": "owner/model"},
    "adapters": {"mine": "prime"},
    "base": {"path": "owner/base"},
    "data": {"kind": "folder", "path": "images", "condition": "canny", "resolution": 64, "count": 3},
    "held_out_of": "",
}
PLAN = {
    "recipe": "recipe.toml",
    "folder": "runs",
    "compare_to": "t2i",
    "evaluate": {"data": {"kind": "folder", "path": "images", "resolution": 64}, "batch_size": 2},
    "views": {"empty": {"prompts": "empty"}},
    "methods": {
        "t2i": {"train": {"adapter": {"method": "t2i"}}},
        "prime": {},
        "same": {"trained_as": "prime"},
    },
    "cells": [{"conditions": ["canny"], "methods": ["base", "prime", "t2i", "same"], "seeds": [0]}],
}
NUMBERS = [0, -1, 2**70, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan")]
TEXTS = ["", " ", "x", "canny", "\x00", "\x1b[2J", "e\nf", "é", "x" * 5000, "no/where", "/", "..", "{0..9}"]
LISTS = [[], [[]], [1, "a"], ["a", "a"], [None], [{}], ["https://u:secret@h/x"]]
TABLES = [{}, {"a": 1}, {"": ""}, {"path": {}}, {"a": {"b": {"c": []}}}]
JUNK = [None, True, False, *NUMBERS, *TEXTS, *LISTS, *TABLES, "https://u:secret@h/x"]


def places(content, path=()):
    """The path of every value."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield (*path, key)
        if isinstance(content[key], dict | list):
            yield from places(content[key], (*path, key))


def mutated(content, draw):
    """With one to three changes."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *above, key = draw.choice(list(places(content)) or [("x",)])
        table = content
        for part in above:
            table = table[part]
        action = draw.random()
        if action < 0.7:
            table[key] = copy.deepcopy(draw.choice(JUNK))
        elif action < 0.8 and isinstance(table, dict):
            table[draw.choice([f"{key}s", "", "unknown", "\x1b", "a.b"])] = draw.choice(JUNK)
        elif action < 0.9 and isinstance(table, dict):
            del table[key]
        else:
            table[key] = [table[key]]
    return content


def without_none(content):
    """As TOML can hold it."""
    if isinstance(content, dict):
        return {str(key): without_none(each) for key, each in content.items() if each is not None}
    return (
        [without_none(each) for each in content if each is not None] if isinstance(content, list) else content
    )


def one_error(call, *given):
    """The call's result; None for one error that is fit to be shown."""
    try:
        return call(*given)
    except InvalidArgument as error:
        text, name = str(error), error.name
    except OSError as error:  # a file name that is too long
        text, name = shown(str(error)), error.filename
    assert name, text
    assert "secret" not in text
    assert not {"\x1b", "\x00"} & set(text)
    return None


def check_recipe(draw):
    content = mutated(RECIPE, draw)
    config = one_error(parse_config, content)
    if config is not None:  # then it survives being written and read, and identifies its run
        assert isinstance(config, TrainConfig)
        json.dumps(identity(config), allow_nan=False)
        assert "\x00" in str(content) or one_error(lambda: dump_config(config))


def check_evaluation(draw):
    content = mutated(EVALUATION, draw)
    found = one_error(lambda: validated(EvaluationRecipe, with_defaults(content)))
    if found is not None:
        json.dumps(found.sampling.seed, allow_nan=False)
        assert found.config.num_inference_steps > 0


def check_plan(draw, folder):
    content = without_none(mutated(PLAN, draw))
    found = one_error(validated, StudyPlan, content)
    if found is not None:
        (folder / "recipe.toml").write_text(dumps(RECIPE))
        with suppress(OSError):
            (folder / "plan.toml").write_text(dumps(content))
            study = one_error(Study, folder / "plan.toml")
            assert study is None or study.cells() is not None


def check_setting(draw, folder):
    keys = [".".join(map(str, place)) for place in places(RECIPE)]
    key = draw.choice([*keys, *(f"{key}.x" for key in keys[:9]), "", ".", "a..b", "\x1b", "seed ", "é"])
    value = draw.choice(
        ["", "1", "nan", "[", "[1", "{", "'", '"', "true", "1e999", "{a=1}", "\x00", "x=y", "[[]]"]
    )
    (folder / "recipe.toml").write_text(dumps(RECIPE))
    setting = draw.choice([f"{key}={value}", key, f"={value}", f"{key} = {value}"])
    one_error(load_recipe, folder / "recipe.toml", [setting])


def check_file(draw, folder):
    """Bytes of a recipe, cut, changed, in another encoding."""
    text = bytearray(dumps(RECIPE).encode())
    for _ in range(draw.choice([0, 1, 3])):
        text[draw.randrange(len(text))] = draw.randrange(256)
    kinds = [
        bytes(text),
        bytes(text[: draw.randrange(len(text))]),
        b"\xef\xbb\xbf" + text,
        b"\xff\xfe" + text,
    ]
    kinds += [
        b"[" * 5000,
        b"a = " + b"[" * 3000,
        bytes(text).replace(b"\n", b"\r\n"),
        text.decode("latin-1").encode("utf-16"),
    ]
    file = folder / "recipe.toml"
    file.write_bytes(draw.choice(kinds))
    one_error(load_recipe, file)
    one_error(read_toml, file, "CONFIG")


def check(seed, folder):
    draw = random.Random(seed)
    check_recipe(draw)
    check_evaluation(draw)
    if seed % 2:
        check_plan(draw, folder)
        check_setting(draw, folder)
    else:
        check_file(draw, folder)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_any_recipe_evaluation_and_plan_is_a_config_or_one_error(tmp_path):
    for seed in range(200):
        check(seed, tmp_path)


PARSERS = {
    "recipe": (RECIPE, parse_config),
    "evaluation": (EVALUATION, lambda content: validated(EvaluationRecipe, with_defaults(content))),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_no_key_takes_a_value_of_another_type_and_none_is_unknown(kind):
    content, parse = PARSERS[kind]
    assert parse(content)
    for *above, key in list(places(content)):
        for name, value in ((key, [[]]), (key, float("nan")), (f"{key}_of_mine", 1)):
            changed = copy.deepcopy(content)
            table = changed
            for part in above:
                table = table[part]
            is_open = above[-1:] in (["extractor"], ["judge"], ["adapters"])  # any key, of some types
            if isinstance(table, list) or (is_open and name != key and above[-1] != "adapters"):
                continue
            table[name] = value
            with pytest.raises(InvalidArgument):
                parse(changed)


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_many_recipes(part, tmp_path):
    for seed in range(1000 + part * 1000, 2000 + part * 1000):
        check(seed, tmp_path)
