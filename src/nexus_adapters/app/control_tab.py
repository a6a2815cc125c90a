"""One tab of the page: what the image should follow, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from nexus_adapters.app.canvas import Drawn, canvas, png_of, props_of, read, value_of
from nexus_adapters.app.form import LABELS, ControlForm, optional
from nexus_adapters.app.models import Models
from nexus_adapters.app.papers import map_paper, mask_paper, picture_paper
from nexus_adapters.choices import DEFAULT_POLICY, POLICIES
from nexus_adapters.conditions import EXTRACTORS, extract

PICTURE, MAP = "a picture", "a structure map"
_POLICIES = {
    "positive": "the prompt",
    "per_branch": "each branch its own",
    "cond_only": "the prompt, not the negative",
}
_NOTE_EDITED = "Edited: used instead of the picture"


@dataclass
class ControlTab:
    """The components of one control."""

    place: int
    tab: gr.Tab
    picture: gr.HTML
    map: gr.HTML
    mask: gr.HTML
    condition: gr.Radio
    source: gr.Radio
    note: gr.Markdown
    again: gr.Button
    map_column: gr.Column
    scale: gr.Slider
    start: gr.Slider
    end: gr.Slider
    policy: gr.Dropdown
    noise_exponent: gr.Textbox

    @property
    def values(self) -> list[Any]:
        """The inputs of `form_of`."""
        return [
            self.picture,
            self.map,
            self.mask,
            self.condition,
            self.source,
            self.scale,
            self.start,
            self.end,
            self.policy,
            self.noise_exponent,
        ]


COUNT = 10
"""Number of values of one control."""


def form_of(values: Sequence[Any]) -> ControlForm:
    """Return the form of one control's values. `InvalidArgument` for what is no drawing of the page."""
    picture, map, mask, condition, source, scale, start, end, policy, exponent = values
    return ControlForm(
        read(picture, "image"),
        read(map, "map"),
        read(mask, "mask"),
        condition,
        source == MAP,
        scale,
        start,
        end,
        policy,
        optional("noise_exponent", exponent),
    )


def tab_label(place: int, control: ControlForm) -> str:
    """Return the title of a tab, which says whether its control is used."""
    return f"Control {place}" + ("" if place == 1 or control.is_used else " (off)")


def text_of_number(value: float | None) -> str:
    """Return the content of a field that may be empty. A field for numbers would turn nothing into 0."""
    return "" if value is None else f"{value:g}"


def build(place: int, models: Models, size: int, first: ControlForm | None = None) -> ControlTab:
    """Lay out the tab."""
    given = first or ControlForm(condition=models.conditions[0])
    has_map = not given.is_map
    with gr.Tab(tab_label(place, given), id=place) as tab:
        with gr.Row(equal_height=False, elem_classes="choices"):
            condition = gr.Radio(
                list(models.conditions),
                value=given.condition,
                label=LABELS["condition"],
                elem_id=f"condition-{place}",
                elem_classes="compact",
                scale=8,
                visible=len(models.conditions) > 1,
            )
            source = gr.Radio(
                [PICTURE, MAP],
                value=MAP if given.is_map else PICTURE,
                label="The canvas shows",
                elem_id=f"source-{place}",
                elem_classes="compact",
                scale=6,
                interactive=models.extracts(given.condition),
            )
        with gr.Row(equal_height=False, elem_classes="canvases"):
            with gr.Column(min_width=240):
                picture = canvas(
                    given.picture,
                    _picture_props(given.condition, given.is_map, models, size),
                    elem_id=f"canvas-{place}",
                )
            with gr.Column(min_width=240, visible=has_map) as map_column:
                map = canvas(given.map, _map_props(given.condition, models, size), elem_id=f"map-{place}")
                with gr.Row(elem_classes="edited"):
                    note = gr.Markdown("", visible=False)
                    again = gr.Button("Extract again", size="sm", visible=False)
        scale = gr.Slider(
            0,
            2,
            value=given.scale,
            step=0.05,
            label=LABELS["scale"],
            elem_id=f"scale-{place}",
            info="0 turns the control off",
        )
        with gr.Accordion("How it acts: schedule, prompts, mask", open=False):
            with gr.Row():
                start = gr.Slider(
                    0, 1, value=given.start, step=0.05, label=LABELS["start"], info="0 is noise"
                )
                end = gr.Slider(0, 1, value=given.end, step=0.05, label=LABELS["end"], info="1 is the image")
            with gr.Row():
                policy = gr.Dropdown(
                    [(_POLICIES[name], name) for name in POLICIES],
                    value=given.policy or DEFAULT_POLICY,
                    label=LABELS["policy"],
                )
                exponent = gr.Textbox(
                    text_of_number(given.noise_exponent),
                    label=LABELS["noise_exponent"],
                    info="Fades the control out with the noise",
                    placeholder="as trained",
                )
            gr.Markdown("**Mask.** Paint where the control acts. Empty: everywhere.")
            mask = canvas(
                given.mask,
                _mask_props(size, given.picture if given.is_map else given.map),
                elem_id=f"mask-{place}",
                elem_classes="see-through",
            )
    return ControlTab(
        place,
        tab,
        picture,
        map,
        mask,
        condition,
        source,
        note,
        again,
        map_column,
        scale,
        start,
        end,
        policy,
        exponent,
    )


def _picture_props(condition: str, is_map: bool, models: Models, size: int) -> dict[str, Any]:
    paper = picture_paper(size)
    if is_map:
        paper = map_paper(EXTRACTORS[condition].kind, size, models.is_embedded)
    hint = "Draw a structure map here, or drop one" if is_map else "Draw here, or drop a photo"
    return props_of(LABELS["map"] if is_map else LABELS["image"], hint, paper, size)


def _map_props(condition: str, models: Models, size: int) -> dict[str, Any]:
    paper = map_paper(EXTRACTORS[condition].kind, size, models.is_embedded)
    return props_of(LABELS["map"], "The structure map appears here. You can edit it", paper, size)


def _mask_props(size: int, behind: Drawn) -> dict[str, Any]:
    return props_of(LABELS["mask"], "", mask_paper(size), size, behind)


def refreshed(
    control: ControlForm, models: Models, size: int, new_kind: bool = False, forced: bool = False
) -> tuple[Any, ...]:
    """Return updates of (picture, map, mask, source, map column, note, again) after a change.

    Args:
        control: the values.
        models: the models.
        size: native side of the base.
        new_kind: whether the condition or the source has changed.
        forced: whether to extract the map even if the user has edited it.
    """
    can_extract = models.extracts(control.condition)
    is_map = control.is_map or not can_extract
    keeps = control.map_wins and not forced and not new_kind
    behind = control.picture if is_map else control.map
    found: Any = gr.skip()
    if not is_map and not keeps:
        has_picture = control.picture.png is not None
        behind = extracted(control.picture, control.condition, size) if has_picture else Drawn()
        found = gr.update(value=value_of(behind), **_map_props(control.condition, models, size))
    picture = source = gr.skip()
    if new_kind:
        picture = gr.update(**_picture_props(control.condition, is_map, models, size))
        source = gr.update(value=MAP if is_map else PICTURE, interactive=can_extract)
    mask = gr.update(**_mask_props(size, behind))
    edited = keeps and not is_map
    return (
        picture,
        found,
        mask,
        source,
        gr.update(visible=not is_map) if new_kind else gr.skip(),
        gr.update(value=_NOTE_EDITED if edited else "", visible=edited),
        gr.update(visible=edited),
    )


def extracted(picture: Drawn, condition: str, size: int) -> Drawn:
    """Return the structure map of a picture at the size of the image that will be generated.

    Raises:
        InvalidArgument: for a picture that cannot be read, or a failing extractor.
    """
    from nexus_adapters.generation.maps import running_extractor

    with running_extractor(condition, {}):
        image = picture.rgb()
        resized = image.resize(map_size(image.size, size), Image.Resampling.LANCZOS)
        return Drawn(png_of(extract(condition, resized)))


def map_size(source: tuple[int, int], native: int) -> tuple[int, int]:
    """Return (width, height) of the image that a picture of this size gives; without warnings."""
    import warnings

    from nexus_adapters.injection.condition import image_size

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height, width = image_size((source[1], source[0]), None, None, native, 8)
    return width, height


def filled(control: ControlForm | None, place: int, models: Models, size: int) -> list[Any]:
    """Return updates of a tab's values, map column, note, "again" and tab, for an example or nothing."""
    given = control or ControlForm(condition=models.conditions[0])
    behind = given.picture if given.is_map else given.map
    return [
        gr.update(
            value=value_of(given.picture), **_picture_props(given.condition, given.is_map, models, size)
        ),
        gr.update(value=value_of(given.map), **_map_props(given.condition, models, size)),
        gr.update(value=value_of(given.mask), **_mask_props(size, behind)),
        given.condition,
        gr.update(value=MAP if given.is_map else PICTURE, interactive=models.extracts(given.condition)),
        given.scale,
        given.start,
        given.end,
        given.policy,
        text_of_number(given.noise_exponent),
        gr.update(visible=not given.is_map),
        gr.update(visible=False),
        gr.update(visible=False),
        gr.update(label=tab_label(place, given)),
    ]
