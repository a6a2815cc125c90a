"""The package as a whole: its public names, what importing it loads, and its distributions."""

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path

import nexus_adapters_embedded
import pytest
from packaging.requirements import Requirement

import nexus_adapters

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "packages" / "nexus-adapters-embedded"
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


@pytest.fixture
def forget_package(monkeypatch):
    """Calling it makes the next import run the package's modules again; the end of the test undoes that."""

    def forget():
        loaded = [name for name in sys.modules if name.partition(".")[0] == "nexus_adapters"]
        return {name: sys.modules.pop(name) for name in loaded}

    for name in PUBLIC:  # so that third-party modules are loaded once, and stay
        getattr(nexus_adapters, name)
    # Without the type checks that tests have, imports take a tenth of the time.
    plain = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]
    monkeypatch.setattr(sys, "meta_path", plain)
    before = forget()
    sys.modules |= before
    yield forget
    forget()
    sys.modules |= before


def test_public_names_are_imported_in_any_order(forget_package):
    """Each as the first one: no module needs another one to be imported before it."""
    for name in sorted(PUBLIC - {"__version__"}):
        forget_package()
        package = import_module("nexus_adapters")
        assert package is not nexus_adapters
        assert getattr(package, name).__name__ == name


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
    assert version("nexus-adapters-embedded") == nexus_adapters_embedded.__version__
    assert nexus_adapters_embedded.__version__ == nexus_adapters.__version__
    assert f"\nversion: {nexus_adapters.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_nothing_needs_torchvision():
    """It does not work with the pinned torch, and transformers fails where it is installed."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    needed = [*(requires("nexus-adapters") or []), *pinned]
    assert "torch==2.13.0" in needed
    assert not [line for line in needed if line.startswith("torchvision")]


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_the_oldest_accepted_versions_are_those_that_are_tested():
    """`make test-floor` installs them: the last patch of 2.6 for `torch>=2.6`."""
    lines = (ROOT / "constraints-floor.txt").read_text().splitlines()
    tested = {r.name: r for r in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for requirement in map(Requirement, project(ROOT)["project"]["dependencies"]):
        (least,), (exact,) = requirement.specifier, tested[requirement.name].specifier
        assert least.operator == ">="
        assert f"{exact.version}.".startswith(f"{least.version}."), requirement.name


def test_the_extra_accepts_the_weights_of_this_version():
    (requirement,) = map(Requirement, project(ROOT)["project"]["optional-dependencies"]["embedded"])
    assert requirement.name == project(EMBEDDED)["project"]["name"]
    assert nexus_adapters_embedded.__version__ in requirement.specifier


def test_the_core_is_small_and_has_no_weights():
    """The files that go into its wheel, uncompressed."""
    (package,) = project(ROOT)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = [
        path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert ROOT / package / "__init__.py" in files
    assert {path.suffix for path in files} <= {".py", ".typed", ".html", ".css", ".js", ".toml"}
    assert sum(path.stat().st_size for path in files) < 3e6


def test_the_weights_are_in_a_distribution_of_their_own():
    (package,) = project(EMBEDDED)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert nexus_adapters_embedded.WEIGHTS.resolve().is_relative_to((EMBEDDED / package).resolve())
    needed = map(Requirement, project(EMBEDDED)["project"]["dependencies"])
    assert [requirement.name for requirement in needed] == ["transformers"]
    assert (EMBEDDED / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
