"""The page: its layout, and what happens on it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr

from nexus_adapters.app import control_tab, generating
from nexus_adapters.app.api import add_api
from nexus_adapters.app.assets import text_of
from nexus_adapters.app.control_tab import COUNT, ControlTab, form_of, refreshed
from nexus_adapters.app.examples import Example, examples_for
from nexus_adapters.app.form import LABELS, Form, optional
from nexus_adapters.app.models import MOST_STEPS, NO_ADAPTER, Models
from nexus_adapters.app.pictures import pictures
from nexus_adapters.app.session import Session
from nexus_adapters.choices import MAX_SEED, RESIZE_MODES, STEPS

CONTROLS = 3
_DRAW = "Press Generate. The images appear here, side by side"
_FIT = "Report an error"


@dataclass
class Page:
    """The components that events read and write, apart from those of the controls."""

    session: gr.State
    tabs: list[ControlTab]
    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    width: gr.Textbox
    height: gr.Textbox
    fit: gr.Dropdown
    names: gr.CheckboxGroup
    unknown: gr.HTML
    generate: gr.Button
    cancel: gr.Button
    results: gr.HTML
    gallery: gr.HTML
    python: gr.Code
    command: gr.Code
    files: gr.HTML

    @property
    def values(self) -> list[Any]:
        """The inputs of `generating.run`, after the session."""
        own = [
            self.names,
            self.prompt,
            self.negative,
            self.seed,
            self.steps,
            self.guidance,
            self.width,
            self.height,
            self.fit,
        ]
        return own + [value for tab in self.tabs for value in tab.values]


def read(values: Sequence[Any]) -> tuple[list[str], Form]:
    """Return the adapters to compare and the form, from the page's values."""
    names, prompt, negative, seed, steps, guidance, width, height, fit, *rest = values
    controls = tuple(form_of(rest[place : place + COUNT]) for place in range(0, len(rest), COUNT))
    mode = fit if fit in RESIZE_MODES else None
    sides = optional("width", width), optional("height", height)
    return names, Form(controls, prompt, negative, seed, steps, guidance, *sides, mode)


def build(models: Models) -> gr.Blocks:
    """Build the page."""
    size = models.native_size
    examples = examples_for(models)
    with gr.Blocks(title="Nexus adapters", analytics_enabled=False, fill_width=True) as blocks:
        blocks.theme = gr.themes.Base(
            primary_hue="indigo",
            neutral_hue="slate",
            font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
            font_mono=("ui-monospace", "Consolas", "monospace"),
        )
        blocks.css = text_of("page.css") + text_of("canvas.css")
        page, buttons = _lay_out(models, size, examples)
        filled = [
            _connect_example(page, button, example, models, size)
            for button, example in zip(buttons, examples, strict=True)
        ]
        _connect(page, models, size, filled)
        add_api(models)
    return cast(gr.Blocks, blocks)


def _lay_out(models: Models, size: int, examples: Sequence[Example]) -> tuple[Page, list[gr.Button]]:
    first = examples[0] if examples else None
    conditions = [control.condition for control in first.controls] if first else [models.conditions[0]]
    columns = list(models.columns(conditions))
    session = gr.State(Session(), time_to_live=24 * 3600, delete_callback=Session.close)
    with gr.Row(elem_classes="top"):
        gr.HTML("<h1>Nexus adapters</h1>", elem_classes="title")
        buttons = []
        if examples:
            with gr.Row(elem_classes="examples"):
                gr.HTML("<span>Examples</span>")
                for place, example in enumerate(examples):
                    buttons.append(
                        gr.Button(
                            example.title,
                            size="sm",
                            elem_classes="example",
                            elem_id=f"example-{place + 1}",
                            min_width=40,
                        )
                    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320), gr.Tabs(elem_id="controls"):
            tabs = [
                control_tab.build(
                    place + 1,
                    models,
                    size,
                    first.controls[place] if first and place < len(first.controls) else None,
                )
                for place in range(CONTROLS)
            ]
        with gr.Column(scale=6, min_width=320):
            prompt = gr.Textbox(
                first.prompt if first else "",
                label=LABELS["prompt"],
                lines=1,
                max_lines=3,
                elem_id="prompt",
                placeholder="What the image should show",
                submit_btn=False,
            )
            unknown = gr.HTML(words_html(models, ""), visible=bool(models.words), elem_id="words")
            with gr.Row():
                generate = gr.Button(
                    "Generate", variant="primary", elem_id="generate", scale=3, min_width=120
                )
                cancel = gr.Button(
                    "Cancel", variant="stop", elem_id="cancel", scale=1, min_width=80, interactive=False
                )
            names = gr.CheckboxGroup(
                columns,
                value=first.names if first else [columns[0]],
                label=LABELS["adapters"],
                elem_id="adapters",
                elem_classes="compact",
            )
            results = pictures(_DRAW, elem_id="results", label="Images")
            with gr.Accordion("Sampling: seed, steps, guidance, size", open=False):
                negative = gr.Textbox("", label=LABELS["negative"], lines=1, elem_id="negative")
                with gr.Row():
                    seed = gr.Number(
                        first.seed if first else 0,
                        label=LABELS["seed"],
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        elem_id="seed",
                    )
                    random = gr.Button("Random seed", size="sm", elem_id="random-seed")
                with gr.Row():
                    steps = gr.Slider(
                        1, MOST_STEPS, value=STEPS, step=1, label=LABELS["steps"], elem_id="steps"
                    )
                    guidance = gr.Slider(
                        0, 20, value=models.guidance, step=0.5, label=LABELS["guidance"], elem_id="guidance"
                    )
                with gr.Row():
                    info = "Pixels, a multiple of 8"
                    width = gr.Textbox("", label=LABELS["width"], placeholder="as the map", info=info)
                    height = gr.Textbox("", label=LABELS["height"], placeholder="as the map", info=info)
                    fit = gr.Dropdown([_FIT, *RESIZE_MODES], value=_FIT, label=LABELS["resize_mode"])
    with gr.Row(equal_height=False):
        with (
            gr.Column(scale=6, min_width=320),
            gr.Accordion("Code for the selected image", elem_id="code"),
        ):
            with gr.Tabs():
                with gr.Tab("Python"):
                    python = _code_box("python", "code-python")
                with gr.Tab("Command line"):
                    command = _code_box("shell", "code-command")
            files = gr.HTML("", elem_id="downloads", elem_classes="files")
        with (
            gr.Column(scale=6, min_width=320),
            gr.Accordion("Images of this session", elem_id="session"),
        ):
            gallery = pictures("Every image stays here until you close the page", elem_id="gallery")
    random.click(
        None,
        None,
        seed,
        js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})",
        api_visibility="private",
        queue=False,
    )
    page = Page(
        session, tabs, prompt, negative, seed, steps, guidance, width, height, fit, names, unknown, generate,
        cancel, results, gallery, python, command, files,
    )  # fmt: skip
    return page, buttons


def _code_box(language: Any, elem_id: str) -> gr.Code:
    return gr.Code(
        "",
        language=language,
        interactive=False,
        elem_id=elem_id,
        lines=8,
        show_line_numbers=False,
        max_lines=20,
        show_label=False,
        wrap_lines=True,
    )


def words_html(models: Models, prompt: str) -> str:
    """Return the words that the base knows, and a warning of others in the prompt."""
    known = {word for group in models.words.values() for phrase in group for word in phrase.split()}
    strange = list(
        dict.fromkeys(word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in known)
    )
    text = ""
    if strange:
        listed = ", ".join(html.escape(word[:30]) for word in strange[:5])
        text = f'<p class="unknown" role="status">This base does not know: {listed}</p>'
    groups = "".join(f"<p><b>{title}</b>: {', '.join(words)}</p>" for title, words in models.words.items())
    plain = re.sub(
        r"[`$\\{}]", "", text + f"<details><summary>Words that this base knows</summary>{groups}</details>"
    )
    return f'<div class="words">{plain}</div>'


_LIGHT: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "trigger_mode": "always_last",
}


def _connect(page: Page, models: Models, size: int, filled: Sequence[Any]) -> None:
    page.prompt.change(lambda prompt: words_html(models, prompt), page.prompt, page.unknown, **_LIGHT)
    for tab in page.tabs:
        _connect_tab(page, tab, models, size)
    generating.connect(page, models, read, filled)


def _connect_tab(page: Page, tab: ControlTab, models: Models, size: int) -> None:
    outputs = [
        tab.picture,
        tab.map,
        tab.mask,
        tab.source,
        tab.map_column,
        tab.note,
        tab.again,
        page.names,
        tab.tab,
    ]

    def refresh(new_kind: bool = False, forced: bool = False) -> Any:
        def run(session: Session, names: list[str], *values: Any) -> tuple[Any, ...]:
            with generating.one_line():
                control = form_of(values)
                updates = refreshed(control, models, size, new_kind, forced)
            if control.is_used:
                session.used[tab.place] = control.condition
            else:
                session.used.pop(tab.place, None)
            label = f"Control {tab.place}" + ("" if tab.place == 1 or control.is_used else " (off)")
            return (
                *updates,
                columns_update(session, models, names, control.condition),
                gr.update(label=label),
            )

        return run

    inputs = [page.session, page.names, *tab.values]
    tab.picture.input(refresh(), inputs, outputs, **_LIGHT)
    tab.map.input(refresh(), inputs, outputs, **_LIGHT)
    gr.on([tab.condition.input, tab.source.input], refresh(new_kind=True), inputs, outputs, **_LIGHT)
    tab.again.click(refresh(forced=True), inputs, outputs, **_LIGHT)


def columns_update(session: Session, models: Models, names: Sequence[str], condition: str) -> Any:
    """Return the update of what can be compared with the controls that are used now."""
    columns = list(models.columns(list(session.used.values()) or [condition]))
    kept = [name for name in columns if name in names]
    if not any(name != NO_ADAPTER for name in kept):
        kept = [columns[0], *kept]
    return gr.update(choices=columns, value=kept)


def _connect_example(page: Page, button: gr.Button, example: Example, models: Models, size: int) -> Any:
    outputs: list[Any] = [
        page.names,
        page.prompt,
        page.negative,
        page.seed,
        page.steps,
        page.guidance,
        page.width,
        page.height,
    ]
    outputs += [page.fit]
    for tab in page.tabs:
        outputs += [*tab.values, tab.map_column, tab.note, tab.again, tab.tab]

    def fill(session: Session) -> list[Any]:
        session.used = {place: control.condition for place, control in enumerate(example.controls, 1)}
        columns = list(models.columns(list(session.used.values())))
        updates: list[Any] = [
            gr.update(choices=columns, value=example.names), example.prompt, "", example.seed, STEPS,
            models.guidance, "", "", _FIT,
        ]  # fmt: skip
        for place, _ in enumerate(page.tabs):
            control = example.controls[place] if place < len(example.controls) else None
            updates += control_tab.filled(control, place + 1, models, size)
        return updates

    return button.click(fill, page.session, outputs, **_LIGHT)
