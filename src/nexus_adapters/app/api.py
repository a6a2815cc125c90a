"""The API for programs: the endpoints /generate and /extract, with one control and plain values."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from nexus_adapters.app.form import number, whole
from nexus_adapters.app.generating import DEVICE, columns_of, one_line, save
from nexus_adapters.app.jobs import Ended, Finished, Job
from nexus_adapters.app.models import Models
from nexus_adapters.app.session import Session
from nexus_adapters.choices import DEFAULT_POLICY, POLICIES, RESIZE_MODES, STEPS
from nexus_adapters.errors import expect
from nexus_adapters.generation.requests import ControlRequest, GenerateRequest, ImageSource, MapSource
from nexus_adapters.generation.settings import save_png


def add_api(models: Models) -> None:
    """Add the endpoints to the page that is being built."""
    session = gr.State(Session(), time_to_live=3600, delete_callback=Session.close)
    first = models.conditions[0]

    async def generate(
        session: Session,
        prompt: str = "",
        image: str | None = None,
        condition: str = first,
        is_map: bool = False,
        adapters: Sequence[str] = (),
        scale: float | None = 1.0,
        start: float | None = 0.0,
        end: float | None = 1.0,
        policy: str = DEFAULT_POLICY,
        noise_exponent: float | None = None,
        mask: str | None = None,
        resize_mode: str | None = None,
        negative: str = "",
        seed: int | None = 0,
        steps: int | None = STEPS,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Generate an image with each adapter, from one picture or structure map and one seed."""
        with one_line(labels=False):
            source = _source(models, image, condition)
            control = ControlRequest(
                MapSource(source) if is_map else ImageSource(source),
                condition_name=condition,
                adapter=next(iter(models.adapters[condition].values())),
                scale=number("scale", scale),
                start=number("start", start),
                end=number("end", end),
                policy=policy,  # type: ignore[arg-type]  # checked there
                noise_exponent=noise_exponent,
                mask=mask,
                resize_mode=resize_mode,  # type: ignore[arg-type]  # checked there
            )
            request = GenerateRequest(
                prompt=prompt,
                negative=negative,
                controls=(control,),
                base=models.base,
                device=models.device,
                dtype=models.dtype,
                steps=whole("steps", steps),
                guidance=models.guidance if guidance is None else guidance,
                seed=whole("seed", seed),
                width=width,
                height=height,
            )
            columns = columns_of(models, request, adapters)
        folder = session.new_folder()
        files, settings = [], []
        async with aclosing(Job(models, [request for _, request in columns]).events()) as events:
            async for event in events:
                if isinstance(event, Finished):
                    name, made_from = columns[event.place]
                    made = await asyncio.to_thread(save, folder, name, made_from, event.generated)
                    session.add(made)
                    files.append(str(made.file))
                    settings.append(made.settings)
                elif isinstance(event, Ended) and event.error is not None:
                    with one_line(labels=False):
                        raise event.error
        return files, settings

    def extract(session: Session, image: str | None, condition: str) -> tuple[str, dict[str, Any]]:
        """Extract the structure map of a picture."""
        from nexus_adapters.conditions import extract, load_image
        from nexus_adapters.generation.maps import running_extractor

        with one_line(labels=False):
            source = _source(models, image, condition)
            expect(models.extracts(condition), "condition", "one that this page extracts", repr(condition))
            picture = load_image(source, argument="image")
            with running_extractor(condition, {}):
                found = extract(condition, picture)
        file: Path = session.new_folder() / f"{condition}.png"
        settings = {"command": "extract", "extractor": condition}
        save_png(file, found, settings)
        return str(file), settings

    with gr.Row(visible=False):
        inputs = [
            gr.Textbox("", label="prompt"),
            gr.File(label="image", type="filepath", file_types=["image"]),
            gr.Dropdown(list(models.conditions), value=first, label="condition"),
            gr.Checkbox(False, label="is_map"),
            gr.CheckboxGroup(_names(models), value=[next(iter(models.adapters[first]))], label="adapters"),
            gr.Number(1.0, label="scale"),
            gr.Number(0.0, label="start"),
            gr.Number(1.0, label="end"),
            gr.Dropdown(list(POLICIES), value=DEFAULT_POLICY, label="policy"),
            gr.Number(None, label="noise_exponent"),
            gr.File(None, label="mask", type="filepath", file_types=["image"]),
            gr.Dropdown(list(RESIZE_MODES), value=None, label="resize_mode"),
            gr.Textbox("", label="negative"),
            gr.Number(0, precision=0, label="seed"),
            gr.Number(STEPS, precision=0, label="steps"),
            gr.Number(None, label="guidance"),
            gr.Number(None, precision=0, label="width"),
            gr.Number(None, precision=0, label="height"),
        ]
        images = gr.File(label="images", file_count="multiple")
        settings = gr.JSON(label="settings")
        gr.Button().click(
            generate,
            [session, *inputs],
            [images, settings],
            api_name="generate",
            concurrency_id=DEVICE,
            concurrency_limit=1,
        )
        map_file = gr.File(label="map")
        gr.Button().click(
            extract,
            [session, inputs[1], inputs[2]],
            [map_file, settings],
            api_name="extract",
            concurrency_id="extract",
        )


def _source(models: Models, image: str | None, condition: str) -> str:
    expect(image is not None, "image", "a file", "none")
    known = ", ".join(models.conditions)
    expect(condition in models.conditions, "condition", f"one of {known}", repr(condition))
    return str(image)


def _names(models: Models) -> list[str]:
    return list(
        dict.fromkeys(name for condition in models.conditions for name in models.columns([condition]))
    )
