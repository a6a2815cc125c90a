"""The pages of the site: links and the navigation lead somewhere. `make docs` builds the site."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build_site(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("build_site")


@pytest.fixture
def root(tmp_path):
    """A repository with two pages, code, and a file to download."""
    for name, text in {
        "docs/index.md": "[guide](guide/one.md#part) and [the web](https://example.org)\n",
        "docs/guide/one.md": "[code](../../src/a.py)\n\n```\n[not a link](none.md)\n```\n",
        "docs/guide/other.md": "![](../../data/b.csv) [notes](../../notes/README.md) [folder](../../notes)\n",
        "src/a.py": "print('```')\n",
        "data/b.csv": "a,b\n",
        "notes/README.md": "[back](../docs/index.md), [code](../src/a.py)\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def copied(build_site, root):
    problems = list(build_site.Pages(root, root / "site").copy())
    files = (root / "site").rglob("*")
    return problems, {str(f.relative_to(root / "site")): f.read_text() for f in files if f.is_file()}


def test_pages_are_copied_with_all_they_link_to(build_site, root):
    problems, files = copied(build_site, root)
    assert problems == []
    assert files["index.md"] == (root / "docs" / "index.md").read_text()
    assert "[code](../repository/src/a.py.md)" in files["guide/one.md"]
    assert "[not a link](none.md)" in files["guide/one.md"]
    assert "![](../repository/data/b.csv)" in files["guide/other.md"]
    assert files["guide/other.md"].count("(../repository/notes/README.md)") == 2
    assert files["repository/notes/README.md"] == "[back](../../index.md), [code](../src/a.py.md)\n"
    assert files["repository/data/b.csv"] == "a,b\n"
    assert "\n````python\nprint('```')\n\n````\n" in files["repository/src/a.py.md"]


def test_short_code_spans_stay_on_one_line(build_site):
    long = "`nexus generate --map a.png --prompt x`"
    assert build_site.marked(f"`--seed` in {long}, `a` (`--out`)\n") == (
        f"`--seed`{{.short}} in {long}, `a` (`--out`{{.short}})\n"
    )


def test_code_blocks_are_copied_as_they_are(build_site, root):
    (root / "docs" / "index.md").write_text("`a b`\n\n```\nls `a b`\n```\n")
    _, files = copied(build_site, root)
    assert files["index.md"] == "`a b`{.short}\n\n```\nls `a b`\n```\n"


@pytest.mark.parametrize("link", ["none.md", "../data", "../../outside.md"])
def test_a_link_that_leads_nowhere_is_a_problem(build_site, root, link):
    (root.parent / "outside.md").write_text("not in the repository")
    (root / "docs" / "index.md").write_text(f"[dead]({link})\n")
    (problem,), _ = copied(build_site, root)
    assert problem.startswith("docs/index.md: ")
    assert link in problem


def test_the_navigation_has_every_page_once(build_site, root):
    config = root / "zensical.toml"
    config.write_text(
        '[project]\nnav = [{ "A" = "index.md" }, { "B" = ["guide/one.md", "guide/none.md"] }]\n'
    )
    missing, dead = build_site.navigation_problems(config, root / "docs")
    assert "docs/guide/other.md is not in the navigation" in missing
    assert "no such page: docs/guide/none.md" in dead


def test_every_page_is_in_the_navigation(build_site):
    assert build_site.navigation_problems(ROOT / "zensical.toml", ROOT / "docs") == []


def test_files_are_read_and_written_as_utf_8(root):
    """Wherever the script runs: Python warns where an encoding is left to the machine."""
    (root / "docs" / "index.md").write_text("Größe, [code](../src/a.py)\n", encoding="utf-8")
    (root / "zensical.toml").write_text('[project]\nnav = ["index.md"]\n', encoding="utf-8")
    code = (
        "from build_site import Pages, navigation_problems as check; from pathlib import Path; "
        f"root = Path({str(root)!r}); list(Pages(root, root / 'site').copy()); "
        "check(root / 'zensical.toml', root / 'docs')"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Größe" in (root / "site" / "index.md").read_text(encoding="utf-8")


def test_no_link_leads_nowhere(build_site, tmp_path):
    assert list(build_site.Pages(ROOT, tmp_path / "site").copy()) == []
