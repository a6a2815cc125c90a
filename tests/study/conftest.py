import pytest
from tests.study.plans import study, write_world

from nexus_adapters.study.cells import run_study
from nexus_adapters.study.report import write_study


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Hashes of the data are kept in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a base, images and a recipe."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(root):
    """A study that has run, and its report in root/out. Tests leave its files as they are."""
    planned = study(root)
    assert run_study(planned) == []
    write_study(planned, root / "out")
    return planned
