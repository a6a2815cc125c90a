"""The page as its user sees it: what can be done on it, by the names on the page."""

import re
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Page, Request

APPEARANCE = (Path(__file__).parent / "appearance.js").read_text()
_OWN = ("data:", "blob:", "about:")
Point = tuple[float, float]


class AppPage:
    """One window with the app.

    Attributes:
        page: Playwright's page, for what has no method here.
        problems: requests to other hosts, and errors that the page reported.
        expected: a pattern of problems that a test causes.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self._found: list[str] = []
        self.expected: str | None = None
        self._address = address
        page.on("console", self._read)
        page.on("pageerror", lambda error: self._found.append(f"page error: {error}"))
        page.on("request", self._check)

    @property
    def problems(self) -> list[str]:
        return [each for each in self._found if not (self.expected and re.search(self.expected, each))]

    def _read(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._found.append(f"console: {message.text} {message.location['url']}")

    def _check(self, request: Request) -> None:
        if not request.url.startswith((self._address, *_OWN)):
            self._found.append(f"asks another host: {request.url}")
