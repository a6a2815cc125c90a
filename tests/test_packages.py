"""Missing packages: the hints install them, wherever nexus-adapters itself was installed from."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from tests.refusals import refused

from nexus_adapters.errors import MISSING
from nexus_adapters.packages import EXTRAS, check_packages, install_command, missing_package

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
BASE = {re.split("[>~]", need)[0] for need in PYPROJECT["project"]["dependencies"]}


def declared(extra):
    """Packages of an extra, without those that nexus-adapters needs anyway, at any version."""
    found = set()
    for need in PYPROJECT["project"]["optional-dependencies"][extra]:
        inner = re.fullmatch(r"nexus-adapters\[(\w+)\]", need)
        found |= declared(inner[1]) if inner else {re.split("[>~]", need)[0]}
    return found - BASE


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_packages_are_those_of_the_extra(extra):
    assert set(EXTRAS[extra].values()) == declared(extra)


def test_the_hint_names_all_that_is_missing_and_nothing_else(monkeypatch):
    for module in ("scipy", "tomli_w"):
        monkeypatch.setitem(sys.modules, module, None)
    assert install_command("eval") == "pip install tomli-w scipy"
    with refused("the package scipy", MISSING, hint="Run pip install tomli-w scipy"):
        check_packages("eval", "torchmetrics", "scipy")
    check_packages("eval", "torchmetrics")


def test_a_package_that_is_installed_but_cannot_be_imported_is_named_too():
    assert install_command("ray", "ray").endswith("'ray[data]'")
    assert install_command("train", "yaml").endswith("pip install yaml")


@pytest.mark.parametrize(
    ("error", "name", "command"),
    [
        (
            ImportError("cannot import 'a'", name="pydantic.b"),
            "pydantic",
            "pip install --upgrade pydantic",
        ),
        (ImportError("a DLL is\nmissing"), "the extra lora", "pip install --upgrade peft"),
    ],
)
def test_a_package_that_is_installed_but_fails_is_not_called_missing(error, name, command):
    found = missing_package("lora" if error.name is None else "train", error)
    assert found.name.endswith(name)
    assert found.received != MISSING
    assert found.received in ("cannot import 'a'", "a DLL is missing")
    assert command in found.hint


def test_a_package_that_another_one_needs_is_named():
    error = ModuleNotFoundError("No module named 'absent.part'", name="absent.part")
    assert missing_package("lora", error).name == "the package absent"
