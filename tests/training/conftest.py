"""What the tests of training share."""

import gc

import pytest
from tests import tiny
from tests.training.runs import SMALL_UNET, Watched, write_images

from nexus_adapters.methods import METHODS, register_method


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with `base`, `sd15` (of four levels), 14 `images`, and the runs' cache. Read only."""
    root = tmp_path_factory.mktemp("training")
    tiny.sd15(unet=tiny.unet(**SMALL_UNET)).save_pretrained(root / "base")
    tiny.sd15().save_pretrained(root / "sd15")
    write_images(root / "images")
    gc.freeze()  # runs collect garbage, which costs less when it need not look at all imported modules
    return root


@pytest.fixture(scope="module")
def watched():
    """The method of that name."""
    with METHODS.temporary():
        yield register_method(Watched())
