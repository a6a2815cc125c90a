"""Examples for the embedded base. Each fills the whole page and succeeds on the first click."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from nexus_adapters.app.canvas import Drawn, png_of
from nexus_adapters.app.form import ControlForm
from nexus_adapters.app.models import NO_ADAPTER, Models


@dataclass(frozen=True)
class Example:
    """What one example puts on the page.

    Attributes:
        title: a few words for its button.
        prompt: the prompt.
        controls: the controls.
        names: the adapters to compare.
        seed: the seed.
    """

    title: str
    prompt: str
    controls: tuple[ControlForm, ...]
    names: list[str] = field(default_factory=lambda: ["Prime", "Slim"])
    seed: int = 0


def examples_for(models: Models) -> tuple[Example, ...]:
    """Return the examples of a base; there are none for a base of the user's own."""
    if not models.is_embedded or models.sources:
        return ()
    from nexus_adapters.conditions import extract

    picture = Image.new("RGB", (128, 128), "navy")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((6, 8, 62, 64), fill="tomato")
    draw.ellipse((63, 58, 123, 118), outline="white", width=14)
    canny = ControlForm(Drawn(png_of(picture)), Drawn(png_of(extract("canny", picture))))
    return (
        Example(
            "Circle and ring",
            "an orange circle above a blue ring on a cyan background",
            (canny,),
            ["Prime", "Slim", NO_ADAPTER],
        ),
    )
