"""Set up before any test module is imported."""

import os
from importlib import import_module

# No test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# In processes that tests start, too: threads of several that wait for each other by spinning cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

# Checks the types and shapes in the package's signatures, in tests only; it must come before the package is
# imported. The hook wants an expression as text. An int is a float here, as type checkers have it, and Self
# stands for anything, since beartype sees methods one by one and not their class.
import_module("beartype.typing")  # named in the expression
install_import_hook(
    "nexus_adapters",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True,"
    " hint_overrides=beartype.FrozenDict({beartype.typing.Self: beartype.typing.Any})))",
)

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads get into each other's way; results do not vary


@pytest.fixture
def install(monkeypatch, tmp_path_factory):
    """Installs a package with entry points: `install("nexus_adapters.blocks", mine="module:Class")`."""

    def install(group, **entry_points):
        folder = tmp_path_factory.mktemp("package")
        info = folder / f"{folder.name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {folder.name}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        monkeypatch.syspath_prepend(folder)

    return install


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests in one process, and those of a study, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "tests/study" if file.startswith("tests/study/") else file

    return Scheduler(config, log)
