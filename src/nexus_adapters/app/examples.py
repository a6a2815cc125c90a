"""Examples for the embedded base. Each fills the whole page and succeeds on the first click."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from PIL import Image

from nexus_adapters.app.canvas import Drawn, png_of
from nexus_adapters.app.form import ControlForm
from nexus_adapters.app.models import NO_ADAPTER, Models
from nexus_adapters.conditions import extract
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import Scene, SceneObject


@dataclass(frozen=True)
class Example:
    """What one example puts on the page.

    Attributes:
        title: a few words for its button.
        prompt: the prompt.
        scene: what the images should show.
        controls: the controls.
        names: the adapters to compare.
        seed: the seed.
    """

    title: str
    prompt: str
    scene: Scene
    controls: tuple[ControlForm, ...]
    names: list[str] = field(default_factory=lambda: ["Prime", "Slim"])
    seed: int = 0


def _scene(background: str, *objects: SceneObject) -> Scene:
    return Scene(objects, background, light_angle=0, light_strength=0)


_CIRCLE_AND_RING = _scene(
    "cyan",
    SceneObject("circle", "orange", "plain", 36, 38, 32, 0),
    SceneObject("ring", "blue", "plain", 90, 88, 32, 0),
)
_CIRCLE_BY_RING = _scene(
    "yellow",
    SceneObject("circle", "red", "plain", 34, 64, 31, 0),
    SceneObject("ring", "green", "plain", 95, 64, 31, 0),
)
_HEART_AND_RING = _scene(
    "orange",
    SceneObject("heart", "red", "plain", 40, 38, 34, 0),
    SceneObject("ring", "cyan", "plain", 88, 90, 34, 0),
)
_SQUARE_AND_RING = _scene(
    "cyan",
    SceneObject("square", "orange", "plain", 46, 46, 38, 0),
    SceneObject("ring", "blue", "plain", 88, 86, 34, 0),
)
_TRIANGLE_AND_CROSS = _scene(
    "blue",
    SceneObject("triangle", "orange", "plain", 38, 64, 32, 0),
    SceneObject("cross", "cyan", "plain", 92, 64, 28, 0),
)


def _map(condition: str, scene: Scene, scale: float = 1.0) -> ControlForm:
    drawn = Drawn(png_of(draw_map(condition, scene)))
    return ControlForm(drawn, condition=condition, is_map=True, scale=scale)


def _picture(scene: Scene) -> ControlForm:
    """Return a picture of the scene in other colors: the prompt decides those of the image."""
    colors = ("purple", "yellow", "red")
    objects = tuple(replace(item, color=colors[place]) for place, item in enumerate(scene.objects))
    picture = Image.fromarray(render(replace(scene, objects=objects, background="pink")).image)
    return ControlForm(Drawn(png_of(picture)), Drawn(png_of(extract("canny", picture))))


def examples_for(models: Models) -> tuple[Example, ...]:
    """Return the examples of a base; there are none for a base of the user's own."""
    if not models.is_embedded or models.sources:
        return ()
    return (
        Example(
            "New colors for a picture",
            "an orange circle above a blue ring on a cyan background",
            _CIRCLE_AND_RING,
            (_picture(_CIRCLE_AND_RING),),
            ["Prime", "Slim", NO_ADAPTER],
        ),
        Example(
            "Sketch",
            "a red circle to the left of a green ring on a yellow background",
            _CIRCLE_BY_RING,
            (_map("sketch", _CIRCLE_BY_RING),),
        ),
        Example(
            "Labels",
            "a red heart above a cyan ring on an orange background",
            _HEART_AND_RING,
            (_map("segmentation", _HEART_AND_RING),),
        ),
        Example(
            "Depth",
            "a blue ring in front of an orange square on a cyan background",
            _SQUARE_AND_RING,
            (_map("depth", _SQUARE_AND_RING),),
        ),
        Example(
            "Two controls",
            "an orange triangle to the left of a cyan cross on a blue background",
            _TRIANGLE_AND_CROSS,
            (_map("sketch", _TRIANGLE_AND_CROSS, 0.7), _map("segmentation", _TRIANGLE_AND_CROSS, 0.7)),
        ),
    )
