"""The sheet of `nexus demo`: its scenes and prompts, the images of every method, and the layout."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from nexus_adapters import __version__
from nexus_adapters.bases.loading import load_base
from nexus_adapters.bundled import BUNDLED, EMBEDDED
from nexus_adapters.choices import CONDITION, STEPS
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import SCENE_METRICS, TestScene, score_images
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import COLORS, NOVEL_COMBINATIONS, Scene, draw_scene
from nexus_adapters.evaluation.generation import Images, Sampling, generate
from nexus_adapters.methods import GenerationSettings, load_adapter
from nexus_adapters.progress import progress

# Test scenes, chosen by score from seeds 0 to 60, with canny and the default options: one on which all
# adapters get the colors right, one on which only Prime and Slim do, and one on which every method fails.
SCENE_SEEDS = (17, 31, 25)
FAILURE = 25
FAILURE_HEADING = "A failure: four patterned objects close together"
CHOICE = (
    "The three scenes were chosen by score from test scenes 0 to 60: one on which all adapters get the "
    "colors right, one on which only Slim and Prime do, and one on which all fail."
)
PROMPTS_PER_MAP = 2
# What docs/how-to/control-strength.md recommends.
SETTINGS = GenerationSettings(policy="cond_only", noise_exponent=0.5)

_METHODS = {"base": None, "t2i": "t2i", "slim": "slim", "prime": "prime"}  # -> name of an embedded adapter
_TITLES = {"base": "Base", "t2i": "T2I-Adapter", "slim": "Nexus Slim", "prime": "Nexus Prime"}
_MAPS = {"canny": "canny edges"}  # titles that differ from the condition's name

# Pixels. The text stays readable when the sheet is shown at half its width.
CELL = 256
_GUTTER = 20
_HEADING = 44  # of a group
_MARGIN = 48
_HEADER = 96
_FOOTER_GAP = 26
_LINE = 30  # of a prompt
_NOTE = 34  # under an image
_ROW_GAP = 26
_GROUP_GAP = 34  # on either side of the rule

_INK, _GREY, _RULE, _ACCENT, _WARNING = "#1a1a1a", "#6b6b6b", "#d9d9d9", "#0b57d0", "#b3261e"
_TITLE_SIZE, _PROMPT_SIZE, _NOTE_SIZE = 26, 21, 18  # sizes at which the hinted font spaces words well
_ARTICLES = ("a", "an")


@dataclass(frozen=True)
class Row:
    """A prompt, with an image and a line of text below it for every column."""

    prompt: str
    images: Sequence[Image.Image]
    notes: Sequence[str]


@dataclass(frozen=True)
class Sheet:
    """The content of the sheet. `columns` holds titles and subtitles; the rows of a group share a map.

    `headings`: number of a group -> the line above it.
    """

    columns: Sequence[tuple[str, str]]
    groups: Sequence[Sequence[Row]]
    footer: Sequence[str]
    headings: Mapping[int, str] = field(default_factory=dict)

    @property
    def content_width(self) -> int:
        """Pixels between the margins."""
        return len(self.columns) * (CELL + _GUTTER) - _GUTTER


def draw_sheet(sheet: Sheet) -> Image.Image:
    """Draw the sheet as an RGB image on white.

    In each group, the words in which a prompt differs from the group's first prompt are highlighted.
    """
    width = sheet.content_width + 2 * _MARGIN
    # Draw on a canvas that is tall enough in any case, then crop it.
    rows = sum(map(len, sheet.groups))
    height = _HEADER + rows * (CELL + 10 * _LINE) + len(sheet.groups) * 2 * _GROUP_GAP + 20 * _LINE
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, sheet.columns)
    top = _MARGIN + _HEADER
    for number, group in enumerate(sheet.groups):
        if number:
            top += _GROUP_GAP - _ROW_GAP
            draw.line([(_MARGIN, top), (width - _MARGIN, top)], _RULE, 2)
            top += _GROUP_GAP
        if number in sheet.headings:
            draw.text((_MARGIN, top), sheet.headings[number], _WARNING, ImageFont.load_default(_TITLE_SIZE))
            top += _HEADING
        for row in group:
            top = _draw_row(canvas, draw, row, group[0].prompt, sheet.content_width, top)
    top += _FOOTER_GAP - _ROW_GAP
    font = ImageFont.load_default(_NOTE_SIZE)
    for words in (line for text in sheet.footer for line in wrap(text.split(), font, sheet.content_width)):
        draw.text((_MARGIN, top), " ".join(words), _GREY, font)
        top += _LINE
    return canvas.crop((0, 0, width, top + _MARGIN - (_LINE - _NOTE_SIZE)))


def wrap(
    words: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Iterator[list[str]]:
    """Yield the words in lines of at most `width` pixels; a longer word gets its own line."""
    line: list[str] = []
    for word in words:
        if line and font.getlength(" ".join([*line, word])) > width:
            yield line
            line = []
        line.append(word)
    if line:
        yield line


def changed_words(prompt: str, first: str) -> list[bool]:
    """Return, for each word of `prompt`, whether it differs from the word at this position in `first`.

    Articles never count as changed: "a" and "an" only follow from the next word.
    """
    words, others = prompt.split(), first.split()
    others += [""] * (len(words) - len(others))
    return [word != other and word not in _ARTICLES for word, other in zip(words, others, strict=False)]


def _draw_header(draw: ImageDraw.ImageDraw, columns: Sequence[tuple[str, str]]) -> None:
    for index, (title, subtitle) in enumerate(columns):
        left = _MARGIN + index * (CELL + _GUTTER)
        draw.text((left, _MARGIN), title, _INK, ImageFont.load_default(_TITLE_SIZE))
        draw.text((left, _MARGIN + 36), subtitle, _GREY, ImageFont.load_default(_NOTE_SIZE))


def _draw_row(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, row: Row, first: str, width: int, top: int
) -> int:
    """Draw the prompt and the images below it; return the y coordinate of the next row."""
    font = ImageFont.load_default(_PROMPT_SIZE)
    changed = iter(changed_words(row.prompt, first))
    for line in wrap(row.prompt.split(), font, width):
        left = float(_MARGIN)
        for word in line:
            draw.text((left, top), word, _ACCENT if next(changed) else _INK, font)
            left += font.getlength(word + " ")
        top += _LINE
    top += 4
    for index, (image, note) in enumerate(zip(row.images, row.notes, strict=True)):
        corner = (_MARGIN + index * (CELL + _GUTTER), top)
        canvas.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), corner)
        place = (corner[0], top + CELL + 8)
        draw.text(place, note, _GREY, ImageFont.load_default(_NOTE_SIZE))
    return top + CELL + _NOTE + _ROW_GAP


def demo_scenes(seed: int, condition_name: str = CONDITION) -> list[TestScene]:
    """Return a test scene in its own colors, then in other colors; all share one map.

    Only colors change: the map shows an object's material, so a prompt with another material would
    contradict it.
    """
    first = draw_scene(seed, "test")
    condition = draw_map(condition_name, first)
    return [
        TestScene(scene, render(scene), condition, caption(scene), condition_name)
        for scene in [first, *other_colors(first)]
    ]


def other_colors(scene: Scene) -> list[Scene]:
    """Return recolored copies of the scene, one for each further prompt.

    All colors move by the same number of places in the color table, so objects that had different colors
    still do, and none gets the color of the background. Combinations that training never sees are excluded.
    """
    moved = [recolor(scene, places) for places in range(1, len(COLORS))]
    seen = [each for each in moved if not has_novel(each)]
    assert len(seen) >= PROMPTS_PER_MAP - 1
    return [seen[len(seen) * index // PROMPTS_PER_MAP] for index in range(1, PROMPTS_PER_MAP)]


def recolor(scene: Scene, places: int) -> Scene:
    """Return the scene with every color moved by `places` in the color table."""
    names = tuple(COLORS)

    def moved(color: str) -> str:
        return names[(names.index(color) + places) % len(names)]

    objects = tuple(replace(item, color=moved(item.color)) for item in scene.objects)
    return replace(scene, objects=objects, background=moved(scene.background))


def has_novel(scene: Scene) -> bool:
    """Return whether an object has a combination of shape, color and material that training never sees."""
    return any((item.shape, item.color, item.material) in NOVEL_COMBINATIONS for item in scene.objects)


@dataclass(frozen=True)
class Method:
    """A way to generate images: the base with an embedded adapter, or alone.

    `adapter_name` and `adapter` are None for the base alone.
    """

    name: str
    adapter_name: str | None
    adapter: Any

    @property
    def parameters(self) -> int:
        """The number of the adapter's parameters; 0 for the base alone."""
        return 0 if self.adapter is None else sum(weight.numel() for weight in self.adapter.parameters())


@dataclass(frozen=True)
class Result:
    """A method's images of `scenes` (for each prompt, all maps) and their scores in [0, 1]."""

    method: Method
    scenes: Sequence[TestScene]
    images: Images
    scores: dict[str, Float[np.ndarray, " n"]]
    noise_rows: Sequence[int]
    generation_s: float

    def mean_scores(self) -> dict[str, float]:
        """Return the mean of every metric over the images."""
        return {name: round(float(values.mean()), 4) for name, values in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return a record of each image, for JSON."""
        return [
            {
                "method": self.method.name,
                "scene_seed": SCENE_SEEDS[noise_row],
                "prompt": scene.prompt,
                "objects": len(scene.scene.objects),
                "noise_row": noise_row,
                **{name: round(float(self.scores[name][index]), 4) for name in SCENE_METRICS},
            }
            for index, (scene, noise_row) in enumerate(zip(self.scenes, self.noise_rows, strict=True))
        ]


def sampling_of(steps: int, guidance: float | None, seed: int) -> Sampling:
    """Return the sampling settings; `guidance=None` selects the embedded base's guidance scale."""
    scale = BUNDLED[EMBEDDED].guidance_scale if guidance is None else guidance
    return Sampling(steps=steps, guidance_scale=scale, seed=seed)


def load_methods(condition_name: str = CONDITION) -> tuple[Any, list[Method]]:
    """Load the embedded base and the methods: base alone, T2I-Adapter (if there is one), Slim and Prime."""
    there = BUNDLED[EMBEDDED].adapters[condition_name]
    methods = [
        Method(name, adapter, None if adapter is None else load_adapter(adapter, condition_name))
        for name, adapter in _METHODS.items()
        if adapter is None or adapter in there
    ]
    return load_base(EMBEDDED), methods


def generate_all(
    base: Any,
    methods: Sequence[Method],
    maps: Sequence[Sequence[TestScene]],
    sampling: Sampling,
) -> list[Result]:
    """Generate and score the images of every method.

    The noise depends on the map alone, so only the prompt changes between the images of a map.

    Args:
        base: the pipeline.
        methods: the ways to generate.
        maps: for each map, its scene in several colors.
        sampling: steps, guidance scale and seed.
    """
    by_prompt = list(zip(*maps, strict=True))
    scenes = [scene for row in by_prompt for scene in row]
    results = []
    with progress(what="generating", unit="batch", total=len(methods) * len(by_prompt)) as bar:
        for method in methods:
            bar.set_description_str(f"generating ({method.name})", refresh=False)
            started_s = time.perf_counter()
            images: Images = []
            for row in by_prompt:
                images += generate(base, method.adapter, row, sampling, SETTINGS, show_progress=False)
                bar.update()
            generation_s = time.perf_counter() - started_s
            noise_rows = [number for _ in by_prompt for number in range(len(maps))]
            scores = score_images(images, scenes)
            results.append(Result(method, scenes, images, scores, noise_rows, generation_s))
    return results


def lay_out(
    maps: Sequence[Sequence[TestScene]],
    results: Sequence[Result],
    sampling: Sampling,
    condition_name: str = CONDITION,
) -> Sheet:
    """Lay out the sheet: columns are the map and each method, groups are maps, rows are prompts."""
    # Only these images were seen when the scenes were chosen; others may succeed where these fail.
    chosen = (condition_name, sampling) == (CONDITION, sampling_of(STEPS, None, seed=0))
    edges = "the map" if condition_name == "canny" else "the edges of the scene"
    return Sheet(
        columns=[
            ("Condition", _MAPS.get(condition_name, condition_name)),
            *(heading(result.method) for result in results),
        ],
        groups=[
            [row(scene, results, index * len(maps) + number) for index, scene in enumerate(scenes)]
            for number, scenes in enumerate(maps)
        ],
        footer=[
            "Each map is used with several prompts that differ in the highlighted words; noise and map stay "
            "the same. Colors: objects in the color that the prompt names. Edges: agreement with "
            f"{edges} (F1, 1 pixel tolerance).",
            *([CHOICE] if chosen else []),
            f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, seed {sampling.seed}, policy "
            f"{SETTINGS.policy}, noise exponent {SETTINGS.noise_exponent}. nexus-adapters {__version__}.",
        ],
        headings={SCENE_SEEDS.index(FAILURE): FAILURE_HEADING} if chosen else {},
    )


def heading(method: Method) -> tuple[str, str]:
    """Return the title and the subtitle of a method's column."""
    size = "without control" if method.adapter is None else f"{method.parameters / 1e6:.2f}M parameters"
    return _TITLES[method.name], size


def row(scene: TestScene, results: Sequence[Result], index: int) -> Row:
    """Return a row: the map, and image number `index` of every method with its scores."""
    images = [Image.fromarray(result.images[index]) for result in results]
    return Row(scene.prompt, [scene.condition, *images], ["", *(note(result, index) for result in results)])


def note(result: Result, index: int) -> str:
    """Return the line of scores under an image."""
    objects = len(result.scenes[index].scene.objects)
    bound = round(result.scores["binding_color"][index] * objects)
    return f"colors {bound}/{objects} · edges {result.scores['edge_f1'][index]:.2f}"
