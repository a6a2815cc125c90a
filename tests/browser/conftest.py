"""One app and one browser for a file of tests, and a window of its own for each test."""

import os
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def windows(browser: "Browser", address: str) -> "Iterator[Callable[[int], AppPage]]":
    """Windows by their number. They are kept, since opening one costs more than loading the page anew."""
    from tests.browser.app_page import AppPage

    context = browser.new_context(base_url=address)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    made: list[AppPage] = []

    def window(number: int) -> AppPage:
        while len(made) <= number:
            made.append(AppPage(context.new_page(), address))
        return made[number]

    yield window
    context.close()


@pytest.fixture
def open_page(windows: "Callable[[int], AppPage]") -> "Iterator[Callable[..., AppPage]]":
    """Loads the app, each time in another window.

    Requests to another host, errors of the page and on its console fail the test, save those that it expects.
    """
    opened: list[AppPage] = []

    def open_page(width: int = 1280, height: int = 800, scheme: str = "light") -> "AppPage":
        app = windows(len(opened))
        opened.append(app)
        app.forget()
        app.look(width, height, scheme)
        app.open()
        return app

    yield open_page
    problems = [problem for app in opened for problem in app.problems]
    for app in opened:
        app.page.goto("about:blank")
    assert problems == []
