"""Take the screenshots of docs/how-to/web-app.md: `nexus app` in Chromium, with the embedded model.

    python scripts/screenshot_app.py [--out docs/how-to/web-app] [--address http://127.0.0.1:7860]

Needs Chromium and the extras app and dev. It starts an app of its own unless an address is given.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests use the page in the same way

from tests.browser.app_page import AppPage  # noqa: E402  # needs the path above
from tests.browser.running import chromium, web_app  # noqa: E402


def drawing(app: AppPage) -> None:
    """Shapes drawn by hand, and what each adapter makes of them."""
    app.page.get_by_label("a structure map", exact=True).check()
    app.page.locator("#canvas-1 .colors").wait_for(state="hidden")  # lines have one color
    app.tool("canvas-1", "Clear")
    app.tool("canvas-1", "Ellipse")
    for corners in (((6, 10), (62, 66)), ((64, 58), (122, 116)), ((78, 72), (108, 102))):
        app.drag("canvas-1", *corners)
    app.prompt.fill("a pink circle above a yellow ring on a blue background")
    app.compare("Prime", "Slim", "T2I-Adapter", "No adapter")
    app.generate()


def two_controls(app: AppPage) -> None:
    """The last example, whose controls are a sketch and labels."""
    app.start(app.page.locator("button.example").last.click)
    app.finished()


def on_a_phone(app: AppPage) -> None:
    """The first example, scrolled to its images."""
    app.generate()
    app.page.locator("#prompt").evaluate(
        "each => scrollTo(0, scrollY + each.getBoundingClientRect().top - 12)"
    )


# A file -> width, height and color scheme of the window, and what is done in it.
SHOTS: dict[str, tuple[int, int, Literal["light", "dark"], Callable[[AppPage], None]]] = {
    "light": (1280, 800, "light", drawing),
    "dark": (1280, 800, "dark", two_controls),
    "phone": (390, 844, "light", on_a_phone),
}


def main(arguments: list[str] | None = None) -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "how-to" / "web-app")
    parser.add_argument("--address", help="of a running app")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.txt"
        address = args.address or stack.enter_context(web_app(log))
        browser = stack.enter_context(chromium())
        app = AppPage(browser.new_page(base_url=address), address)
        for name, (width, height, scheme, use) in SHOTS.items():
            app.look(width, height, scheme)
            app.open()
            use(app)
            app.page.mouse.move(0, 0)
            shot = app.page.screenshot(animations="disabled")
            Image.open(io.BytesIO(shot)).save(args.out / f"{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
