"""The embedded models are tiny and random in these tests."""

import pytest
from tests.weights import use_weights, write_tiny

pytest.importorskip("gradio")


@pytest.fixture(scope="session")
def _tiny_weights(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def weights(_tiny_weights):
    with pytest.MonkeyPatch.context() as patch:
        use_weights(patch, _tiny_weights)
        yield _tiny_weights
