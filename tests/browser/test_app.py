"""The web app in Chromium: what a user does with mouse, keyboard and files, and what they see."""

import ast
import io
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from nexus_adapters.cli import build_parser
from nexus_adapters.embedded.held_out import TestScene, score_images
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import Scene, SceneObject
from nexus_adapters.generation.settings import read_settings

if TYPE_CHECKING:
    from tests.browser.app_page import AppPage

pytestmark = pytest.mark.browser

OpenPage = Callable[..., "AppPage"]
# Where the mouse draws a circle and a ring: the corners of ellipses, as in the first example.
ELLIPSES = (((6, 8), (62, 64)), ((63, 58), (123, 118)), ((77, 72), (109, 104)))
FEW_STEPS = 8


def scene(circle: str, ring: str, background: str) -> Scene:
    objects = (
        SceneObject("circle", circle, "plain", 34.5, 36.5, 28.5 / 0.92, 0),
        SceneObject("ring", ring, "plain", 93.5, 88.5, 30.5, 0),
    )
    return Scene(objects, background, light_angle=0, light_strength=0)


def scores(image: Image.Image, drawn: Scene, lines: Image.Image) -> tuple[float, float]:
    """(fraction of objects with the color of the scene, F1 of the image's edges against these lines)."""
    expected = TestScene(drawn, render(drawn), lines, "", "canny")
    found = score_images([np.asarray(image.convert("RGB"))], [expected])
    return float(found["binding_color"][0]), float(found["edge_f1"][0])


def draw(app: "AppPage") -> Image.Image:
    """Draw the outlines of a circle and a ring, as a structure map."""
    app.page.get_by_label("a structure map", exact=True).check()
    app.page.locator("#canvas-1 .colors").wait_for(state="hidden")  # lines have one color
    app.tool("canvas-1", "Clear")
    app.tool("canvas-1", "Ellipse")
    for corners in ELLIPSES:
        app.drag("canvas-1", *corners)
    return app.drawn("canvas-1").convert("RGB")


def settle(app: "AppPage", steps: int = FEW_STEPS, *names: str) -> None:
    app.unfold("Sampling")
    app.put("steps", steps)
    app.compare(*(names or ("Prime",)))


def test_what_is_drawn_decides_the_shapes_and_what_is_typed_the_colors(open_page: OpenPage) -> None:
    app = open_page()
    settle(app)
    lines = draw(app)
    assert 300 < (np.asarray(lines)[..., 0] == 255).sum() < 1000
    found = []
    for colors in (("orange", "blue", "cyan"), ("yellow", "red", "purple")):
        circle, ring, background = colors
        article = "an" if circle == "orange" else "a"
        app.prompt.fill(f"{article} {circle} circle above a {ring} ring on a {background} background")
        (image,) = app.generate().values()
        found.append(scores(image, scene(*colors), lines))
        assert app.drawn("canvas-1").convert("RGB").tobytes() == lines.tobytes()
    assert [colors for colors, _ in found] == [1, 1]
    assert min(f1 for _, f1 in found) > 0.6


def test_the_first_click_gives_an_image_for_each_adapter(open_page: OpenPage) -> None:
    app = open_page()
    images = app.generate()
    lines = app.drawn("map-1")
    assert list(images) == ["Prime", "Slim", "No adapter"]
    for name in ("Prime", "Slim"):
        colors, f1 = scores(images[name], scene("orange", "blue", "cyan"), lines)
        assert (colors, f1 > 0.75) == (1, True), name


def test_an_example_fills_the_page_and_starts(open_page: OpenPage) -> None:
    app = open_page()
    before = app.drawn("canvas-1").tobytes(), app.prompt.input_value()
    app.start(app.page.locator("button.example").last.click)
    app.page.locator("#results progress").first.wait_for()
    app.button("Cancel").click()
    app.finished()
    assert app.drawn("canvas-1").tobytes() != before[0]
    assert app.prompt.input_value() != before[1]


@pytest.mark.full
def test_every_example_generates(open_page: OpenPage) -> None:
    app = open_page()
    for button in app.page.locator("button.example").all():
        app.start(button.click)
        assert len(app.finished()) >= 2


def test_cancel_stops_within_two_steps_and_loses_nothing(open_page: OpenPage) -> None:
    app = open_page()
    settle(app, 100)
    app.prompt.fill("a red ring")
    lines = draw(app).tobytes()
    app.start(app.button("Generate").click)
    progress = app.page.locator("#results progress")
    app.wait_until("document.querySelector('#results progress')?.value > 0.02")
    before = float(progress.evaluate("bar => bar.value"))
    app.button("Cancel").click()
    started = time.monotonic()
    app.finished()
    assert time.monotonic() - started < 3
    after = app.page.locator("#results figcaption").first.inner_text()
    assert "cancelled" in after
    assert before < 0.9
    assert app.prompt.input_value() == "a red ring"
    assert app.drawn("canvas-1").convert("RGB").tobytes() == lines
    app.put("steps", 2)
    assert list(app.generate()) == ["Prime"]


def test_a_bad_file_is_reported_and_nothing_is_lost(open_page: OpenPage) -> None:
    app = open_page()
    before = app.drawn("canvas-1").tobytes()
    for name, content in (
        ("notes.png", b"no image"),
        ("page.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ):
        app.drop("canvas-1", name, content)
        app.wait_for(name, "#canvas-1 [role=status]")
        assert app.drawn("canvas-1").tobytes() == before


def test_a_dropped_photo_is_extracted_and_its_map_can_be_edited(open_page: OpenPage) -> None:
    app = open_page()
    photo = Image.new("RGB", (300, 300), "navy")
    photo.paste("gold", (60, 60, 240, 240))
    file = io.BytesIO()
    photo.save(file, format="JPEG")
    before = app.canvas("map-1").evaluate("canvas => canvas.toDataURL()")
    app.drop("canvas-1", "photo.jpg", file.getvalue(), "image/jpeg")
    app.wait_until("before => document.querySelector('#map-1 canvas').toDataURL() !== before", before)
    found = app.drawn("map-1")
    app.tool("map-1", "Line")
    app.drag("map-1", (10, 10), (40, 10))
    app.page.get_by_text("used instead of the picture").wait_for()
    edited = np.asarray(app.drawn("map-1"))
    assert (edited[..., 0] > np.asarray(found)[..., 0]).sum() > 20
    app.button("Extract again").click()
    app.button("Extract again").wait_for(state="hidden")
    assert app.drawn("map-1").tobytes() == found.tobytes()


def test_reloading_ends_what_runs_and_the_page_works_again(open_page: OpenPage) -> None:
    app = open_page()
    settle(app, 100, "Prime", "Slim", "No adapter")
    app.button("Generate").click()
    app.wait_until("document.querySelector('#results progress')?.value > 0")
    app.expected = "AbortError|Connection errored out"  # the request that reloading ends
    app.open()
    assert app.images() == {}
    settle(app, 1)
    started = time.monotonic()
    assert list(app.generate()) == ["Prime"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_readable_and_fits(open_page: OpenPage, scheme: str) -> None:
    app = open_page(scheme=scheme)
    settle(app, 1)
    app.unfold("How it acts")
    app.page.get_by_text("Words that this base knows").click()
    app.prompt.fill("a red unicorn")
    app.wait_for("does not know: unicorn")
    app.generate()
    assert app.faults() == []
    app.look(390, 844, scheme)
    assert app.faults() == []


def test_it_opens_on_a_phone(open_page: OpenPage) -> None:
    app = open_page(390, 844)
    app.drag("canvas-1", (20, 100), (100, 100))
    assert app.drawn("canvas-1").getpixel((60, 100))[:3] == (0, 0, 0)  # the first color of the brush
    assert app.faults() == []


def test_the_keyboard_is_enough(open_page: OpenPage) -> None:
    app = open_page()
    settle(app, 1)
    app.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    for wanted in ("Picture. Draw", "Prompt", "Generate"):
        tab_to(app, wanted)
        if wanted.startswith("Picture"):
            before = app.drawn("canvas-1").tobytes()
            for key in ("Space", "Shift+ArrowRight", "Shift+ArrowDown", "Space"):
                app.page.keyboard.press(key)
            assert app.drawn("canvas-1").tobytes() != before
        if wanted == "Prompt":
            app.page.keyboard.press("Control+A")
            app.page.keyboard.type("a green star")
    assert app.prompt.input_value() == "a green star"
    app.start(lambda: app.page.keyboard.press("Enter"))
    assert list(app.finished()) == ["Prime"]


def tab_to(app: "AppPage", name: str) -> None:
    """Press Tab until the focus is on what has this name, which must show it."""
    for _ in range(100):
        app.page.keyboard.press("Tab")
        found = app.page.evaluate(
            "(({ariaLabel, id, textContent, labels}) =>"
            " ariaLabel || labels?.[0]?.textContent || textContent || id)(document.activeElement)"
        ).strip()
        if found.startswith(name):
            assert shows_focus(app), name
            return
    raise AssertionError(f"Tab does not reach {name}")


def shows_focus(app: "AppPage") -> bool:
    """Whether the focused element, or what is around it, looks different without the focus."""
    box = app.page.evaluate(
        "(({x, y, width, height}) => ({x: x - 6, y: y - 6, width: width + 12, height: height + 12}))"
        "(document.activeElement.getBoundingClientRect())"
    )
    focused = app.page.screenshot(clip=box, animations="disabled")
    app.page.evaluate("window.focused = document.activeElement; window.focused.blur()")
    blurred = app.page.screenshot(clip=box, animations="disabled")
    app.page.keyboard.press("Shift")  # from now on, the keyboard moves the focus
    app.page.evaluate("window.focused.focus({ focusVisible: true })")
    return focused != blurred


def test_code_and_files_of_the_selected_image(open_page: OpenPage, tmp_path: Path) -> None:
    app = open_page()
    settle(app, 1, "Prime", "Slim")
    app.put("seed", 7)
    app.generate()
    app.page.locator("#results .frame").nth(1).click()
    copied = {}
    for tab, code in (("Python", "python"), ("Command line", "command")):
        app.page.get_by_role("tab", name=tab, exact=True).click()
        app.page.locator(f"#code-{code} button[aria-label*='opy']").first.click()
        app.wait_until("navigator.clipboard.readText().then(text => text.length > 40)")
        copied[code] = str(app.page.evaluate("navigator.clipboard.readText()"))
    prompt = app.prompt.input_value()
    strings = [node.value for node in ast.walk(ast.parse(copied["python"])) if isinstance(node, ast.Constant)]
    assert prompt in strings
    program, *words = shlex.split(copied["command"].replace("\\\n", " "))
    assert program == "nexus"
    request = build_parser().parse_args(words)
    assert (request.prompt, request.seed, request.steps) == (prompt, 7, 1)
    assert "slim" in copied["command"]
    links = app.page.locator("#downloads a").evaluate_all(
        "all => all.map(link => [link.download, link.href])"
    )
    for name, address in links:
        (tmp_path / name).write_bytes(app.page.request.get(address).body())
    (file,) = tmp_path.glob("slim*.png")
    settings = read_settings(file)
    assert (settings["prompt"], settings["seed"]) == (prompt, 7)
    for name, _ in links:
        Image.open(tmp_path / name).verify()


def test_two_windows_at_once_get_what_each_would_get_alone(open_page: OpenPage) -> None:
    windows = [open_page(), open_page()]
    alone, at_once = [], []
    for seed, app in enumerate(windows, 1):
        settle(app, 2)
        app.put("seed", seed)
        app.prompt.fill(f"a {('red', 'blue')[seed - 1]} star")
        alone.append(app.generate()["Prime"].tobytes())
    for app in windows:
        app.start(app.button("Generate").click)
    for app in windows:
        at_once.append(app.finished()["Prime"].tobytes())
    assert at_once == alone
    assert alone[0] != alone[1]
