"""Misleading log lines of libraries are hidden around the package's own calls, and only there."""

import logging
import subprocess
import sys

import pytest
import torch
from tests import tiny
from tests.weights import write_tiny

from nexus_adapters import StableDiffusionNexusPipeline
from nexus_adapters.library_logs import MISLEADING, logs_hidden

DIFFUSERS = "diffusers.models.modeling_utils"


@pytest.fixture
def logged(monkeypatch):
    """The messages of diffusers' models, as they reach the handlers of its logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    return messages


def test_only_these_lines_and_only_inside(logged):
    logger = logging.getLogger(DIFFUSERS)
    with logs_hidden():
        logger.warning("modules in UNet that %s. And so on", MISLEADING[1])
        logger.warning("the model has modules that should be kept in float32: ['norm']")
    logger.warning("%s", MISLEADING[1])
    assert logged == ["the model has modules that should be kept in float32: ['norm']", MISLEADING[1]]


def test_the_filter_goes_with_an_error():
    before = list(logging.getLogger(DIFFUSERS).filters)
    with pytest.raises(ValueError, match="inside"), logs_hidden():
        raise ValueError("inside")
    assert logging.getLogger(DIFFUSERS).filters == before


def test_pipelines_change_their_dtype_without_a_line(logged):
    base = tiny.sd15()
    pipe = StableDiffusionNexusPipeline.from_pipe(base, adapter=tiny.adapter(base.unet))
    assert pipe.to(torch.bfloat16) is pipe
    assert {part.dtype for part in (pipe.unet, pipe.adapter, pipe.vae)} == {torch.bfloat16}
    assert logged == []
    base.to(torch.float32)  # the stock pipeline's lines are diffusers' own
    assert any(MISLEADING[1] in line for line in logged)


# In a process of its own, since transformers logs when it is first imported. The weights are tiny.
CODE = """
from pathlib import Path
import sys
from types import SimpleNamespace
sys.modules["nexus_adapters_embedded"] = SimpleNamespace(WEIGHTS=Path(sys.argv[1]))
from nexus_adapters import extract, load_embedded
from PIL import Image
pipe = load_embedded("canny", "prime")
pipe.set_progress_bar_config(disable=True)
map = extract("canny", Image.new("RGB", (128, 128)))
pipe("a red star", image=map, num_inference_steps=1)
"""


# Each leads to diffusers' pipelines, at whose import transformers logs, in another way.
IMPORTS = (
    "from nexus_adapters.embedded import held_out",
    "from nexus_adapters.evaluation.run import evaluate",
    "from nexus_adapters import StableDiffusionNexusPipeline",
    "import nexus_adapters.training.run",
)


@pytest.mark.parametrize("code", [IMPORTS[1], *(pytest.param(c, marks=pytest.mark.full) for c in IMPORTS)])
def test_an_import_leaves_stderr_empty(code):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_first_image_leaves_stderr_empty(tmp_path):
    code = [sys.executable, "-c", CODE, str(write_tiny(tmp_path))]
    found = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
