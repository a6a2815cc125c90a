"""The package as a whole: its public names, and that importing it costs nothing."""

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import nexus_adapters

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Control",
    "InvalidArgument",
    "NexusAdapter",
    "StableDiffusionNexusPipeline",
    "StableDiffusionXLNexusPipeline",
    "__version__",
    "attach",
    "extract",
    "load_adapter",
    "load_base",
    "load_embedded",
    "register_base",
    "register_block",
    "register_condition",
    "register_method",
    "register_metric",
}


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names():
    assert set(nexus_adapters.__all__) == PUBLIC
    assert set(dir(nexus_adapters)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_found_and_kept(name):
    assert getattr(nexus_adapters, name) is getattr(nexus_adapters, name)
    assert name in vars(nexus_adapters)


def test_public_names_are_imported_in_any_order():
    """Each as the first one: no module needs another one to be imported before it."""
    result = python(
        "import sys\n"
        f"for name in {sorted(PUBLIC - {'__version__'})}:\n"
        "    for module in [m for m in sys.modules if m.split('.')[0] == 'nexus_adapters']:\n"
        "        del sys.modules[module]\n"
        "    assert getattr(__import__('nexus_adapters'), name), name\n"
    )
    assert result.returncode == 0, result.stderr


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'nexus_adapters' has no attribute 'NexusAdaptor'"):
        _ = nexus_adapters.NexusAdaptor


def test_import_loads_nothing_heavy():
    result = python(
        "import sys, nexus_adapters\ndir(nexus_adapters)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'cv2', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert result.returncode == 0, result.stderr


def test_what_only_names_or_looks_up_loads_nothing_heavy():
    result = python(
        "import sys\n"
        "from nexus_adapters import InvalidArgument, register_condition, register_metric\n"
        "from nexus_adapters.adapter.saved import find_saved\n"
        "assert len(find_saved('prime').sha256()) == 64\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert result.returncode == 0, result.stderr


def test_extract_needs_no_torch():
    result = python(
        "import sys\nfrom PIL import Image\nfrom nexus_adapters import extract\n"
        "extract('canny', Image.new('RGB', (8, 8)))\nassert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


def test_the_version_is_the_same_everywhere():
    assert version("nexus-adapters") == nexus_adapters.__version__
    assert f"\nversion: {nexus_adapters.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_nothing_needs_torchvision():
    """It does not work with the pinned torch, and transformers fails where it is installed."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    needed = [*(requires("nexus-adapters") or []), *pinned]
    assert "torch==2.13.0" in needed
    assert not [line for line in needed if line.startswith("torchvision")]
