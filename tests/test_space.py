"""The Hugging Face Space: it serves the page under its own name, and its files fit the package."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.weights import use_weights, write_tiny

import nexus_adapters

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces"
pytest.importorskip("gradio")


def test_it_serves_the_page_under_its_own_name(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    monkeypatch.setenv("SPACE_HOST", "someone-nexus.hf.space")
    served = {}
    monkeypatch.setattr(module, "serve", lambda build, **options: served.update(options, page=build()))
    module.main()
    assert served["allowed_hosts"] == ["someone-nexus.hf.space"]
    assert served["framed_by"] == ["https://huggingface.co"]
    assert {function.api_name for function in served["page"].fns.values()} >= {"generate", "extract"}


def test_its_versions_are_those_of_the_package():
    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert fields["sdk_version"] in Requirement(*extras["app"]).specifier
    assert (SPACE / fields["app_file"]).is_file()
    (line,) = [
        line for line in (SPACE / "requirements.txt").read_text().splitlines() if line.startswith("nexus")
    ]
    requirement = Requirement(line)
    assert requirement.extras <= set(extras)
    assert requirement.specifier.contains(nexus_adapters.__version__, prereleases=True)
