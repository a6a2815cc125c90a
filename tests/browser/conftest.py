"""One app and one browser for a file of tests, and a window of its own for each test."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from tests.browser.app_page import AppPage


def absent(what: str) -> None:
    """Skip, but where the tests must run (.ci/run), fail."""
    (pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    try:
        from tests.browser.running import chromium, find_chromium
    except ImportError:
        absent("playwright: pip install playwright")
    if find_chromium() is None:
        absent("chromium, chromium-browser or google-chrome on PATH")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app") / "log.txt"


@pytest.fixture(scope="module")
def address(browser: "Browser", log: Path) -> Iterator[str]:
    pytest.importorskip("gradio")
    from tests.browser.running import web_app

    with web_app(log) as address:
        yield address


@pytest.fixture
def open_page(browser: "Browser", address: str) -> "Iterator[Callable[..., AppPage]]":
    """Opens the app in a new window, with Playwright's options for a window (color_scheme="dark").

    Requests to another host, errors of the page and on its console fail the test, save those that it expects.
    """
    from tests.browser.app_page import AppPage

    with ExitStack() as stack:
        opened: list[AppPage] = []

        def open_page(width: int = 1280, height: int = 800, **options: object) -> AppPage:
            size = {"width": width, "height": height}
            context = browser.new_context(base_url=address, viewport=size, **options)
            stack.callback(context.close)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            opened.append(AppPage(context.new_page(), address))
            opened[-1].open()
            return opened[-1]

        yield open_page
        assert [problem for page in opened for problem in page.problems] == []
