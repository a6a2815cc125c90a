"""Drawing a sheet: methods as columns, prompts as rows, grouped by the map that they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Pixels. Text is sized to stay readable where the sheet is shown at half its width.
CELL = 256
_GUTTER = 20
_MARGIN = 48
_HEADER = 96
_FOOTER_GAP = 26
_LINE = 30  # of a prompt
_NOTE = 34  # under an image
_ROW_GAP = 26
_GROUP_GAP = 34  # on either side of the rule

_INK, _GREY, _RULE, _ACCENT = "#1a1a1a", "#6b6b6b", "#d9d9d9", "#0b57d0"
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
    """`columns`: title and subtitle of each. Rows of one group share a map."""

    columns: Sequence[tuple[str, str]]
    groups: Sequence[Sequence[Row]]
    footer: Sequence[str]

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
