"""Python code that ships with a model never runs, also where "y" is waiting on stdin."""

import builtins
import io
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers as t
from PIL import Image
from tests import tiny
from tests.conditions import tiny_models
from tests.refusals import refused

from nexus_adapters.bases.loading import BaseSource, load_base, load_encoders, open_base
from nexus_adapters.conditions import extract
from nexus_adapters.conditions.transformers_models import load_model
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.evaluation.config import EvaluationConfig
from nexus_adapters.evaluation.scoring import Scorer
from nexus_adapters.methods import load_adapter
from nexus_adapters.metrics.learned_features import TransformersFeatures, load_features

CPU, F32 = torch.device("cpu"), torch.float32
IMAGE = Image.new("RGB", (32, 32), "gray")
# Whatever class is asked for is found, and says that it was.
CODE = """
import os
open(os.environ["RAN"], "a").write("ran")
from transformers import CLIPTextConfig as Config
class Model: pass
"""


@pytest.fixture(autouse=True)
def ran(tmp_path, monkeypatch):
    """A file that exists as soon as any code of a model has run; everything is answered by "y"."""
    file = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(file))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    asked = []
    ask = builtins.input
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or ask(*words))
    yield file
    assert not file.exists()
    assert not asked


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def custom(folder: Path, model_type: str = "") -> str:
    """A model whose files name classes in a module of its own; `model_type`: of the library, or none."""
    folder.mkdir()
    (folder / "module_of_a_model.py").write_text(CODE)
    auto = [*(n for n in dir(t) if n.startswith("AutoModel")), "AutoConfig", "AutoTokenizer"]
    named = {
        name: "module_of_a_model.Config" if name == "AutoConfig" else "module_of_a_model.Model"
        for name in auto
    }
    named |= {"AutoImageProcessor": "module_of_a_model.Model", "AutoProcessor": "module_of_a_model.Model"}
    named["AutoTokenizer"] = ["module_of_a_model.Model", "module_of_a_model.Model"]
    for name in ("config", "preprocessor_config", "processor_config", "tokenizer_config"):
        content = {"auto_map": named} | (
            {"model_type": model_type or "module_of_a_model"} if name == "config" else {}
        )
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


LOADERS = {
    "depth": lambda model: extract("depth", IMAGE, model=model),
    "segmentation": lambda model: extract("segmentation", IMAGE, model=model),
    "clip": lambda model: Scorer(EvaluationConfig(clip=model)),
    "features": lambda model: Scorer(EvaluationConfig(features=model)),
    "load_features": load_features,
}


@pytest.mark.parametrize("model_type", ["", "clip_text_model"])  # one the library lacks; one of another task
@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_that_needs_its_own_code_is_refused(loader, model_type, tmp_path):
    expected = {"clip": "clip", "features": "features"}.get(loader, "model")
    with refused(expected, "model", hint="never runs code" if not model_type else ""):
        LOADERS[loader](custom(tmp_path / "model", model_type))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_code_of_a_processor_does_not_run(file, tmp_path):
    folder = Path(tiny_models.dpt(tmp_path / "dpt"))
    (folder / "module_of_a_model.py").write_text(CODE)
    (folder / "preprocessor_config.json").unlink()
    (folder / file).write_text(json.dumps({"auto_map": {"AutoImageProcessor": "module_of_a_model.Model"}}))
    with suppress(InvalidArgument):  # the library may choose a processor of its own
        load_model("depth estimation", str(folder))


def test_a_known_model_is_loaded_by_the_library_whatever_code_its_folder_has(tmp_path):
    folder = Path(tiny_models.dpt(tmp_path / "dpt"))
    (folder / "module_of_a_model.py").write_text(CODE)
    edited(
        folder / "config.json",
        auto_map={"AutoConfig": "module_of_a_model.Config", "AutoModel": "module_of_a_model.Model"},
    )
    assert load_model("depth estimation", str(folder)).kind == "dpt"


def test_code_of_a_tokenizer_does_not_run(tmp_path):
    folder = Path(tiny_models.clip(tmp_path / "clip"))
    (folder / "module_of_a_model.py").write_text(CODE)
    named = {"AutoTokenizer": ["module_of_a_model.Model", "module_of_a_model.Model"]}
    edited(folder / "tokenizer_config.json", auto_map=named, tokenizer_class="Unknown")
    edited(folder / "config.json", model_type="clip")
    model = TransformersFeatures(str(folder))
    with suppress(InvalidArgument):
        model.texts(["a cat"])


def copied(base: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(base, tmp_path / "base")
    for part in ("text_encoder", "vae", "tokenizer", "unet"):
        (folder / part / "module_of_a_model.py").write_text(CODE)
        (folder / part / "this.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny.sd15().save_pretrained(folder)
    return folder


PARTS = {
    "the folder's own module": ("text_encoder", ["module_of_a_model", "Model"]),
    "a module that is not imported": ("vae", ["this", "Model"]),
    "a class chosen by its config": ("text_encoder", ["transformers", "AutoModel"]),
    "a tokenizer chosen by its config": ("tokenizer", ["transformers", "AutoTokenizer"]),
    "a denoiser chosen by its config": ("unet", ["diffusers", "AutoModel"]),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_base_with_parts_of_its_own_code_is_refused(what, base, tmp_path):
    part, kind = PARTS[what]
    folder = copied(base, tmp_path)
    edited(folder / "model_index.json", **{part: kind})
    for load in (
        open_base,
        load_base,
        lambda path: load_encoders(open_base(base), BaseSource(path), CPU, F32),
    ):
        with refused("base", ".".join(kind), hint="never runs code"):
            load(str(folder))


def test_a_pipeline_class_of_its_own_is_not_run(base, tmp_path):
    folder = copied(base, tmp_path)
    (folder / "module_of_a_model.py").write_text(CODE)
    edited(folder / "model_index.json", _class_name=["module_of_a_model", "Model"])
    with refused("base", hint="never runs code"):
        load_base(str(folder))


def test_parts_that_name_code_in_their_configs_are_loaded_without_it(base, tmp_path):
    folder = copied(base, tmp_path)
    for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"):
        edited(
            folder / file,
            auto_map={
                "AutoModel": "module_of_a_model.Model",
                "AutoTokenizer": ["module_of_a_model.Model", None],
            },
        )
    assert load_base(str(folder)).text_encoder is not None


def test_an_adapter_that_names_code_is_loaded_without_it(tmp_path):
    tiny.adapter(tiny.unet()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "module_of_a_model.py").write_text(CODE)
    edited(tmp_path / "adapter" / "config.json", auto_map={"AutoModel": "module_of_a_model.Model"})
    assert load_adapter(tmp_path / "adapter") is not None
    edited(tmp_path / "adapter" / "config.json", _class_name=["module_of_a_model", "Model"])
    with suppress(InvalidArgument):
        load_adapter(tmp_path / "adapter")
