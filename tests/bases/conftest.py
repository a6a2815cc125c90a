import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion in diffusers' layout; not to be changed."""
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    tiny.sd15().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(saved, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a pipeline that differs in some parts."""

    def made(build: Callable[..., Any] = tiny.sd15, **changes: Any) -> Path:
        build(**changes).save_pretrained(tmp_path / "changed")
        return tmp_path / "changed"

    return made
