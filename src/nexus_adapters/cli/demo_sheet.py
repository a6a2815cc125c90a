"""From the demo's results to the sheet: what stands where, and in which words."""

from collections.abc import Sequence

from PIL import Image

from nexus_adapters import __version__
from nexus_adapters.cli.demo_methods import Method, Result
from nexus_adapters.cli.sheet import Row, Sheet
from nexus_adapters.evaluation.methods import Sampling
from nexus_adapters.evaluation.scenes import TestScene

_MAPS = {"canny": "canny edges"}
_TITLES = {"base": "Base", "t2i": "T2I-Adapter", "slim": "Nexus Slim", "prime": "Nexus Prime"}


def lay_out(
    maps: Sequence[Sequence[TestScene]],
    results: Sequence[Result],
    sampling: Sampling,
    condition: str = "canny",
) -> Sheet:
    """A column for the map and each method, a group for each map, a row for each of its prompts."""
    return Sheet(
        columns=[
            ("Condition", _MAPS.get(condition, condition)),
            *(heading(result.method) for result in results),
        ],
        groups=[
            [row(scene, results, index * len(maps) + number) for index, scene in enumerate(scenes)]
            for number, scenes in enumerate(maps)
        ],
        footer=[
            "Each map is used with several prompts, which differ in the marked words; noise and map stay the "
            "same. Colors: objects that have the color of the prompt. Edges: agreement with "
            f"{'the map' if condition == 'canny' else 'the edges of the scene'} (F1, 1 pixel tolerance).",
            f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, seed {sampling.seed}. "
            f"nexus-adapters {__version__}.",
        ],
    )


def heading(method: Method) -> tuple[str, str]:
    """A column's title and subtitle."""
    size = "without control" if method.adapter is None else f"{method.parameters / 1e6:.2f}M parameters"
    return _TITLES[method.name], size


def row(scene: TestScene, results: Sequence[Result], index: int) -> Row:
    """The map and every method's image of number `index`, with scores."""
    images = [Image.fromarray(result.images[index]) for result in results]
    return Row(scene.prompt, [scene.condition, *images], ["", *(note(result, index) for result in results)])


def note(result: Result, index: int) -> str:
    """The scores under an image."""
    objects = len(result.scenes[index].scene.objects)
    bound = round(result.scores["binding_color"][index] * objects)
    return f"colors {bound}/{objects} · edges {result.scores['edge_f1'][index]:.2f}"
