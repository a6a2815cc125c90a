import pytest
from tests.weights import write_tiny


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """The folder of tiny random weights for every embedded model; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("weights"))
