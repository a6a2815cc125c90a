"""Build the documentation site, strictly: `make docs` builds it and serves it.

    python scripts/build_site.py            # build/site
    python scripts/build_site.py --serve    # and show it at http://localhost:8000, until Ctrl-C

`--serve` shows the copy in build/site-source: it does not follow changes in docs/. Run the script again.

The pages in docs/ are written for GitHub, too, and link to files elsewhere in the repository. A site has only
what is in its folder of pages, so the pages are first copied to build/site-source, together with every file
that they link to: pages as they are, code as a page of its own, and everything else to download.

A dead link, a page that the navigation lacks, and a docstring that cannot be read are errors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "zensical.toml"
BUILD = ROOT / "build"
SOURCE = BUILD / "site-source"  # `docs_dir` of zensical.toml
OUTSIDE = "repository"  # the folder of files that are not in docs/
CODE = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "bash", "": "text"}  # shown as a page
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=[)\s])")
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
SHORT = 32  # letters of a code span that stays on one line, also on a phone
# As zensical and griffe print them, without colors.
PROBLEM = re.compile(r"^(griffe:|WARNING|Error)|Warning:|Error:", re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Copy the pages, build the site, and print what is wrong; the status is 1 if anything is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="show the site in a browser, until Ctrl-C; it does not follow changes in docs/",
    )
    args = parser.parse_args(arguments)
    problems = [*Pages(ROOT, SOURCE).copy(), *navigation_problems(CONFIG, ROOT / "docs")]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems or not build():
        return 1
    if args.serve:
        subprocess.run([*ZENSICAL, "serve", "--open", "--config-file", str(CONFIG)], check=False)
    return 0


ZENSICAL = (sys.executable, "-m", "zensical")


def build() -> bool:
    """Whether the site was built without a problem."""
    shutil.rmtree(BUILD / "site", ignore_errors=True)
    command = [*ZENSICAL, "build", "--strict", "--clean", "--config-file", str(CONFIG)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
        env={**os.environ, "NO_COLOR": "1", "PYTHONUTF8": "1"},
    )
    is_good = done.returncode == 0 and not PROBLEM.search(done.stdout)
    if not is_good:
        print(done.stdout.partition("Traceback")[0], file=sys.stderr)
    return is_good


class Pages:
    """The pages of docs/, and every file of the repository that they lead to.

    Args:
        root: the repository.
        to: a folder that is replaced.
    """

    def __init__(self, root: Path, to: Path) -> None:
        self.root, self.to = root, to
        self._waiting: list[Path] = []  # files outside docs/ that a page links to
        self._copied: set[Path] = set()

    def copy(self) -> Iterator[str]:
        """Copy all, and yield a line per link that leads nowhere."""
        shutil.rmtree(self.to, ignore_errors=True)
        docs = self.root / "docs"
        self._waiting = [path for path in sorted(docs.rglob("*")) if path.is_file()]
        while self._waiting:
            path = self._waiting.pop()
            if path in self._copied:
                continue
            self._copied.add(path)
            target = self.to / self.place(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                text, dead = self.linked(path)
                target.write_text(text, encoding="utf-8")
                yield from dead
            elif target.suffix == ".md":
                code = path.read_text(encoding="utf-8")
                target.write_text(code_page(path.relative_to(self.root), code), encoding="utf-8")
            else:
                shutil.copyfile(path, target)

    def place(self, path: Path) -> Path:
        """Where a file of the repository is in the site's folder of pages."""
        inside = path.relative_to(self.root)
        if inside.parts[0] == "docs":
            return inside.relative_to("docs")
        if path.is_dir():
            return Path(OUTSIDE) / inside / "README.md"
        return Path(OUTSIDE) / inside.parent / (inside.name + (".md" if path.suffix in CODE else ""))

    def linked(self, page: Path) -> tuple[str, list[str]]:
        """A page's text with its links as the site has them, and a line for each that leads nowhere."""
        place, dead = self.place(page), list[str]()

        def rewrite(match: re.Match[str]) -> str:
            name, mark, fragment = match[1].partition("#")
            if not name or ":" in name:
                return match[0]
            found = Path(os.path.normpath(page.parent / name))
            if found == self.root / "README.md" and (self.root / "docs" / "index.md").exists():
                found = self.root / "docs" / "index.md"  # the site's own first page
            if not found.exists() or not found.is_relative_to(self.root):
                dead.append(f"{page.relative_to(self.root)}: no such file: {name}")
                return match[0]
            if found.is_dir():
                found = found / "README.md"
                if not found.exists():
                    dead.append(f"{page.relative_to(self.root)}: a folder without a README.md: {name}")
                    return match[0]
            self._waiting.append(found)
            return os.path.relpath(self.place(found), place.parent) + mark + fragment

        text = page.read_text(encoding="utf-8")
        pieces = (part if is_code else marked(LINK.sub(rewrite, part)) for part, is_code in parts(text))
        return "".join(pieces), dead


def parts(text: str) -> Iterator[tuple[str, bool]]:
    """A page's text in pieces, and whether each is a code block."""
    end = 0
    for block in FENCED.finditer(text):
        yield text[end : block.start()], False
        yield block[0], True
        end = block.end()
    yield text[end:], False


def marked(text: str) -> str:
    """Prose whose short code spans have a class that keeps them on one line: browsers break "--seed"."""

    def mark(match: re.Match[str]) -> str:
        can_break = len(match[2]) <= SHORT and re.search(r"[-\s]", match[2])
        return match[0] + "{.short}" if can_break else match[0]

    return SPAN.sub(mark, text)


def code_page(name: Path, text: str) -> str:
    """A page that shows a file; the search leaves it out."""
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall(r"`{3,}", text) or [""]))
    head = f"---\ntitle: {name.name}\nsearch:\n  exclude: true\n---\n\n# `{name}`\n"
    return f"{head}\n{fence}{CODE[name.suffix]}\n{text}\n{fence}\n"


def navigation_problems(config: Path, docs: Path) -> list[str]:
    """Pages that the navigation lacks, and entries without a page."""
    listed = set(entries(tomllib.loads(config.read_text(encoding="utf-8"))["project"]["nav"]))
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    missing = [f"{config.name}: docs/{name} is not in the navigation" for name in sorted(there - listed)]
    return missing + [f"{config.name}: no such page: docs/{name}" for name in sorted(listed - there)]


def entries(nav: Any) -> Iterator[str]:
    """The pages of a navigation, sections included."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(part)


if __name__ == "__main__":
    sys.exit(main())
