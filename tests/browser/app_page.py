"""The page as its user sees it: what can be done on it, by the names on it."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect

APPEARANCE = (Path(__file__).parent / "appearance.js").read_text()
WAIT_S = 100
_OWN = ("data:", "blob:", "about:")
_IMAGES = """
all => Promise.all(all.map(async image => {
    const blob = await (await fetch(image.src)).blob();
    return [image.closest("figure").querySelector("figcaption span").textContent, await new Promise(done => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result);
        reader.readAsDataURL(blob);
    })];
}))
"""


_MARK = "document.querySelectorAll('#results figure').forEach(figure => (figure.dataset.old = true))"
_ENDED = """() => {
    const figures = [...document.querySelectorAll("#results figure")];
    const ended = figures.every(each => !each.dataset.old && !each.querySelector("progress"));
    return figures.length && ended && document.querySelector("#cancel").disabled;
}"""


class AppPage:
    """One window with the app.

    Attributes:
        page: Playwright's page, for what has no method here.
        expected: a pattern of the problems that a test causes.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.expected: str | None = None
        self._address = address
        self._found: list[str] = []
        page.set_default_timeout(WAIT_S * 1000)
        page.on("console", self._read)
        page.on("pageerror", lambda error: self._found.append(f"page error: {error}"))
        page.on("request", self._check)

    @property
    def problems(self) -> list[str]:
        """Requests to other hosts, and errors of the page, except those that the test causes."""
        return [each for each in self._found if not (self.expected and re.search(self.expected, each))]

    def _read(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._found.append(f"console: {message.text} ({message.location['url']})")

    def _check(self, request: Request) -> None:
        if not request.url.startswith((self._address, *_OWN)):
            self._found.append(f"asked another host: {request.url}")

    def forget(self) -> None:
        """Start anew: no problems, none expected."""
        self._found.clear()
        self.expected = None

    def look(self, width: int, height: int, scheme: Literal["light", "dark"]) -> None:
        """Give the window a size in pixels, and the system a color scheme."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)

    def open(self) -> None:
        self.page.goto("/")
        expect(self.button("Generate")).to_be_enabled(timeout=WAIT_S * 1000)
        for canvas in ("canvas-1", "map-1"):  # the first example's pictures, which are decoded later
            self.page.locator(f"#{canvas} .nexus-canvas:not(.empty)").wait_for()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Prompt", exact=True)

    # Canvases: "canvas-1" is the first picture or map, "map-1" the extracted map, "mask-1" the mask.

    def canvas(self, name: str) -> Locator:
        return self.page.locator(f"#{name} canvas")

    def tool(self, canvas: str, title: str) -> None:
        self.page.locator(f"#{canvas} .nexus-canvas").get_by_title(title, exact=True).click()

    def drag(self, canvas: str, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, in pixels of the image, and release it at the last one."""
        paper = self.canvas(canvas)
        paper.scroll_into_view_if_needed()
        box = paper.bounding_box()
        assert box is not None
        scale = box["width"] / int(paper.get_attribute("width") or 0)
        mouse = self.page.mouse
        for place, (x, y) in enumerate(points):
            mouse.move(box["x"] + (x + 0.5) * scale, box["y"] + (y + 0.5) * scale)
            if place == 0:
                mouse.down()
        mouse.up()

    def drawn(self, canvas: str) -> Image.Image:
        """What is on a canvas."""
        return decoded(self.canvas(canvas).evaluate("canvas => canvas.toDataURL()"))

    def drop(self, canvas: str, name: str, content: bytes, kind: str = "image/png") -> None:
        file: Any = {"name": name, "mimeType": kind, "buffer": content}
        self.page.locator(f"#{canvas} input[type=file]").set_input_files(file)

    # Settings and results.

    def unfold(self, title: str) -> None:
        """Open a section that is closed at first."""
        self.page.get_by_role("button", name=re.compile(title)).click()

    def put(self, setting: str, value: float) -> None:
        """Type a number."""
        field = self.page.locator(f"#{setting} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def compare(self, *names: str) -> None:
        """Choose exactly these adapters."""
        for box in self.page.locator("#adapters label").all():
            box.locator("input").set_checked(box.inner_text().strip() in names)

    def generate(self) -> dict[str, Image.Image]:
        """Press Generate and wait for the images."""
        self.start(self.button("Generate").click)
        return self.finished()

    def start(self, action: Callable[[], None]) -> None:
        """Do what starts a generation."""
        self.page.evaluate(_MARK)
        action()

    def finished(self) -> dict[str, Image.Image]:
        """Wait for the end of the generation that was started: name -> image."""
        self.wait_until(_ENDED)
        return self.images()

    def images(self, where: str = "results") -> dict[str, Image.Image]:
        found = self.page.locator(f"#{where} figure img").evaluate_all(_IMAGES)
        return {name: decoded(url) for name, url in found}

    def wait_until(self, condition: str, arg: object = None) -> None:
        """Wait for a JavaScript condition. To ask at every frame would cost more than the page."""
        self.page.wait_for_function(condition, arg=arg, polling=100)

    def wait_for(self, text: str, where: str = "body") -> None:
        expect(self.page.locator(where).first).to_contain_text(text, timeout=WAIT_S * 1000)

    def faults(self) -> list[Any]:
        """What is hard to read on the page, white in the dark, or wider than the window."""
        return list(self.page.evaluate(APPEARANCE))


def decoded(url: str) -> Image.Image:
    """The image of a data URL, with its file's texts in `info`."""
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    image.load()
    return image
