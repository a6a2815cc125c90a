"""The demo's sheet: which scenes and prompts, their images by every method, and how they are laid out."""

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
from nexus_adapters.choices import CONDITION
from nexus_adapters.embedded.caption import caption
from nexus_adapters.embedded.held_out import SCENE_METRICS, TestScene, score_images
from nexus_adapters.embedded.maps import draw_map
from nexus_adapters.embedded.render import render
from nexus_adapters.embedded.scene import COLORS, NOVEL_COMBINATIONS, Scene, draw_scene
from nexus_adapters.evaluation.generation import Images, Sampling, generate
from nexus_adapters.methods import GenerationSettings, load_adapter
from nexus_adapters.progress import progress

# Test scenes, chosen by score among the first 30, with canny: two on which Prime and Slim succeed, and one on
# which every method fails.
SCENE_SEEDS = (17, 23, 25)
FAILURE = 25
PROMPTS_PER_MAP = 2
# What docs/how-to/control-strength.md recommends.
SETTINGS = GenerationSettings(policy="cond_only", noise_exponent=0.5)

_METHODS = {"base": None, "t2i": "t2i", "slim": "slim", "prime": "prime"}  # -> the embedded adapter's name
_TITLES = {"base": "Base", "t2i": "T2I-Adapter", "slim": "Nexus Slim", "prime": "Nexus Prime"}
_MAPS = {"canny": "canny edges"}  # conditions whose maps have another name

# Pixels. Text is sized to stay readable where the sheet is shown at half its width.
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
_TITLE_SIZE, _PROMPT_SIZE, _NOTE_SIZE = 26, 21, 18  # at which the hinted font keeps its words apart
_ARTICLES = ("a", "an")


@dataclass(frozen=True)
class Row:
    """A prompt, and an image with a line below it for every column."""

    prompt: str
    images: Sequence[Image.Image]
    notes: Sequence[str]


@dataclass(frozen=True)
class Sheet:
    """`columns`: title and subtitle of each. Rows of a group share a map. `headings`: by group."""

    columns: Sequence[tuple[str, str]]
    groups: Sequence[Sequence[Row]]
    footer: Sequence[str]
    headings: Mapping[int, str] = field(default_factory=dict)

    @property
    def content_width(self) -> int:
        """Pixels between the margins."""
        return len(self.columns) * (CELL + _GUTTER) - _GUTTER


def draw_sheet(sheet: Sheet) -> Image.Image:
    """RGB on white. Of a group's prompts, the words in which one differs from the first are marked."""
    width = sheet.content_width + 2 * _MARGIN
    # Drawn on a canvas that is surely high enough, and cut where the drawing ends.
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
    """The words in lines of at most `width` pixels; a longer word has a line to itself."""
    line: list[str] = []
    for word in words:
        if line and font.getlength(" ".join([*line, word])) > width:
            yield line
            line = []
        line.append(word)
    if line:
        yield line


def changed_words(prompt: str, first: str) -> list[bool]:
    """Of each word of `prompt`, whether another stands there in `first`. Articles only follow the words."""
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
    """Draw the prompt and below it the images; give back where the next row begins."""
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
    """A test scene in its own colors, then in others: the map stays, and is the same image in all of them.

    Only colors change. What an object is made of shows in the map, so other words for it would contradict it.
    """
    first = draw_scene(seed, "test")
    condition = draw_map(condition_name, first)
    return [
        TestScene(scene, render(scene), condition, caption(scene), condition_name)
        for scene in [first, *other_colors(first)]
    ]


def other_colors(scene: Scene) -> list[Scene]:
    """The scene with all colors exchanged, in as many ways as there are further prompts.

    All colors move on by the same number of places in the table, so that objects that differed still do, and
    none takes the background's. Combinations that training never sees are left to the study.
    """
    moved = [recolor(scene, places) for places in range(1, len(COLORS))]
    seen = [each for each in moved if not has_novel(each)]
    assert len(seen) >= PROMPTS_PER_MAP - 1
    return [seen[len(seen) * index // PROMPTS_PER_MAP] for index in range(1, PROMPTS_PER_MAP)]


def recolor(scene: Scene, places: int) -> Scene:
    """The same objects in the same places, every color `places` further in the table."""
    names = tuple(COLORS)

    def moved(color: str) -> str:
        return names[(names.index(color) + places) % len(names)]

    objects = tuple(replace(item, color=moved(item.color)) for item in scene.objects)
    return replace(scene, objects=objects, background=moved(scene.background))


def has_novel(scene: Scene) -> bool:
    """Whether an object is a combination of shape, color and material that training never sees."""
    return any((item.shape, item.color, item.material) in NOVEL_COMBINATIONS for item in scene.objects)


@dataclass(frozen=True)
class Method:
    """A way to generate. `adapter_name` is the embedded adapter's; None, like the adapter, for the base."""

    name: str
    adapter_name: str | None
    adapter: Any

    @property
    def parameters(self) -> int:
        """Number of the adapter's weights."""
        return 0 if self.adapter is None else sum(weight.numel() for weight in self.adapter.parameters())


@dataclass(frozen=True)
class Result:
    """A method's images of `scenes` (prompt by prompt, each over all maps) and their scores in [0, 1]."""

    method: Method
    scenes: Sequence[TestScene]
    images: Images
    scores: dict[str, Float[np.ndarray, " n"]]
    noise_rows: Sequence[int]
    generation_s: float

    def mean_scores(self) -> dict[str, float]:
        """Every metric's mean over the images."""
        return {name: round(float(values.mean()), 4) for name, values in self.scores.items()}

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each image, for JSON."""
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
    """How to sample; without `guidance`, with the one that suits the embedded base."""
    scale = BUNDLED[EMBEDDED].guidance_scale if guidance is None else guidance
    return Sampling(steps=steps, guidance_scale=scale, seed=seed)


def load_methods(condition_name: str = CONDITION) -> tuple[Any, list[Method]]:
    """The embedded base; and as methods the base alone, T2I-Adapter (where there is one), Slim and Prime."""
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
    """Every method's images, and their scores. `maps`: for each map, its scene in several colors.

    The noise depends on the map alone, so from prompt to prompt the words are all that changes.
    """
    by_prompt = list(zip(*maps, strict=True))
    scenes = [scene for row in by_prompt for scene in row]
    results = []
    with progress(what="generating", unit="batch", total=len(methods) * len(by_prompt)) as bar:
        for method in methods:
            bar.set_description_str(f"generating by {method.name}", refresh=False)
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
    """A column for the map and each method, a group for each map, a row for each of its prompts."""
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
            "The prompts of a map differ in the marked words; map and noise stay the same. Colors: objects "
            f"that have the color of the prompt. Edges: agreement with {edges} (F1, 1 pixel tolerance).",
            "Maps chosen by score, with canny: two successes and one failure. Most scenes lie in between.",
            f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, seed {sampling.seed}, policy "
            f"{SETTINGS.policy}, noise exponent {SETTINGS.noise_exponent}. nexus-adapters {__version__}.",
        ],
        headings={SCENE_SEEDS.index(FAILURE): "A failure: four patterned objects close together"},
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
