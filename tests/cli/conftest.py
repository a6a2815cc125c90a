import shutil

import pytest
from tests.weights import use_weights, write_tiny


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """The folder of tiny random weights for every embedded model; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def module_weights(tiny_weights, tmp_path_factory):
    """The embedded models are tiny in the whole module, and its caches are its own."""
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, tiny_weights)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tiny_weights


@pytest.fixture(scope="session")
def unreadable_weights(tiny_weights, tmp_path_factory):
    """The same with a base that cannot be loaded: for what is refused before anything is."""
    root = shutil.copytree(tiny_weights, tmp_path_factory.mktemp("unreadable") / "weights")
    for file in (root / "base").rglob("*.safetensors"):
        file.write_bytes(b"")
    return root
