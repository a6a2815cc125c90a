"""Build both distributions, and use them as a user would: installed from the wheels, outside the repository.

    python scripts/check_release.py                            # build/release
    python scripts/check_release.py --tag v0.1.0 --out dist    # also compare the versions with a tag

Needs Python 3.11 or newer and a package index; it makes its own environments. Wheels are built from the
source distributions, so those are checked, too. It takes a few minutes, most of them to install torch. On
Linux, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to avoid the gigabytes of the CUDA build.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = {"nexus_adapters": ROOT, "nexus_adapters_embedded": ROOT / "packages" / "nexus-adapters-embedded"}
ENDS = ("-py3-none-any.whl", ".tar.gz")
MOST_MEGABYTES = {"nexus_adapters": 3, "nexus_adapters_embedded": 60}
MOST_SECONDS = 0.3  # of `import nexus_adapters` in a fresh process, without Python's own start

_IMPORT_TIME = (
    "import time; start = time.perf_counter(); import nexus_adapters; print(time.perf_counter() - start)"
)
_WITHOUT_EXTRAS: tuple[tuple[str, ...], ...] = (
    ("--version",),
    ("demo", "--out", "demo"),
    ("train", "--list"),
    ("evaluate", "--list"),
)
_WITH_EXTRAS: tuple[tuple[str, ...], ...] = (
    ("train", "embedded-canny", "--dry-run"),
    ("evaluate", "evaluate-embedded", "--count", "1", "--steps", "1", "--out", "compared"),
)


def main() -> None:
    """Exit with status 1 and one line for the first thing that is wrong."""
    parser = argparse.ArgumentParser(description="Build both distributions and try them.")
    parser.add_argument("--tag", metavar="TAG", help="v and the version that both must have")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "release", metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = args.out.resolve()
        wheels = build(out, Path(folder))
        check_files(out, args.tag)
        try_out(wheels, Path(folder))
    print(f"both distributions are in {args.out}")


def build(out: Path, folder: Path) -> list[Path]:
    """Write both source distributions and wheels into `out`, replacing earlier ones; return the wheels."""
    remove_earlier(out)
    python = environment(folder / "tools")
    run(python, "-m", "pip", "install", "--quiet", "build", "twine")
    for project in PROJECTS.values():
        run(python, "-m", "build", "--outdir", out, project)
    files = sorted(out.iterdir())
    run(python, "-m", "twine", "check", "--strict", *files)
    return [file for file in files if file.suffix == ".whl"]


def remove_earlier(out: Path) -> None:
    """Delete the distributions of an earlier run. Stop, and delete nothing, if the folder has other files."""
    fail_unless(out.is_dir() or not out.exists(), f"--out: expected a folder, got the file '{out}'")
    found = sorted(out.iterdir()) if out.exists() else []
    others = [path.name for path in found if not (path.is_file() and is_ours(path.name))]
    fail_unless(not others, f"--out: expected an empty folder, got '{out}' with {', '.join(others[:3])}")
    for path in found:
        path.unlink()


def is_ours(name: str) -> bool:
    """Whether a file's name is that of one of the distributions, of any version."""
    return name.startswith(tuple(f"{project}-" for project in PROJECTS)) and name.endswith(ENDS)


def check_files(out: Path, tag: str | None) -> None:
    """Both have one version, that of the tag, and no file is larger than it should be."""
    names = sorted(file.name for file in out.iterdir())
    version = names[0].removeprefix("nexus_adapters-").partition("-")[0]
    expected = sorted(f"{name}-{version}{end}" for name in PROJECTS for end in ENDS)
    fail_unless(names == expected, f"expected {expected}, got {names}")
    fail_unless(tag in (None, f"v{version}"), f"the tag {tag} is not v{version}")
    for file in out.iterdir():
        size, most = file.stat().st_size / 1e6, MOST_MEGABYTES[file.name.partition("-")[0]]
        print(f"{file.name}: {size:.1f} MB", flush=True)
        fail_unless(size < most, f"{file.name} has {size:.1f} MB, expected less than {most}")


def try_out(wheels: Sequence[Path], folder: Path) -> None:
    """Install the wheels into an empty environment, and run what README and guides begin with."""
    python = environment(folder / "user")
    work = folder / "work"
    work.mkdir()
    nexus = python.with_name("nexus")
    run(python, "-m", "pip", "install", "--quiet", *wheels)
    run(python, "-m", "pip", "check")
    seconds = min(float(run(python, "-c", _IMPORT_TIME, cwd=work, quiet=True)) for _ in range(5))
    print(f"import nexus_adapters: {seconds:.3f} s", flush=True)
    fail_unless(seconds < MOST_SECONDS, f"the import took {seconds:.2f} s")
    for arguments in _WITHOUT_EXTRAS:
        run(nexus, *arguments, cwd=work)
    core = next(wheel for wheel in wheels if wheel.name.startswith("nexus_adapters-"))
    run(python, "-m", "pip", "install", "--quiet", *wheels, f"{core}[train,eval]")
    run(python, "-m", "pip", "check")
    for arguments in _WITH_EXTRAS:
        run(nexus, *arguments, cwd=work)


def environment(folder: Path) -> Path:
    """Make a virtual environment, and return its Python."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def run(*command: object, cwd: Path = ROOT, quiet: bool = False) -> str:
    """Run a command, outside of what this process imports from; the script ends where it fails."""
    words = list(map(str, command))
    if not quiet:
        print("$", *words, flush=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        words, cwd=cwd, env=clean, check=False, text=True, stdout=subprocess.PIPE if quiet else None
    )
    fail_unless(done.returncode == 0, f"status {done.returncode} of {' '.join(words)}")
    return done.stdout or ""


def fail_unless(fits: bool, message: str) -> None:
    """Exit with the message unless `fits`."""
    if not fits:
        sys.exit(f"check_release: {message}")


if __name__ == "__main__":
    main()
