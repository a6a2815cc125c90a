"""What Generate, Cancel and a click on an image do."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from nexus_adapters.app.board import Board
from nexus_adapters.app.code import command_text, files_of, python_code
from nexus_adapters.app.form import Form, chosen, label_of
from nexus_adapters.app.jobs import Ended, Finished, Job
from nexus_adapters.app.models import Generated, Models
from nexus_adapters.app.pictures import Picture, address_of, shown
from nexus_adapters.app.session import Made, Session
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.generation.requests import GenerateRequest
from nexus_adapters.generation.settings import save_png

if TYPE_CHECKING:
    from nexus_adapters.app.page import Page

Read = Callable[[Sequence[Any]], tuple[list[str], Form]]
DEVICE = "device"
"""Name of the group of events of which one runs at a time."""
_CANCEL_S = 60  # the longest that a step may take


def error_of(error: Exception, labels: bool = True) -> gr.Error:
    """Return the one line that users see, with the page's labels or the names of arguments."""
    if isinstance(error, InvalidArgument):
        text = str(error.with_names(label_of) if labels else error)
    elif isinstance(error, MemoryError):
        text = str(error) or "not enough memory"
    else:
        return gr.Error(f"The generation failed: {type(error).__name__}")
    return gr.Error(text, print_exception=False)


@contextmanager
def one_line(labels: bool = True) -> Iterator[None]:
    """Turn errors that users can do something about into a `gr.Error` of one line."""
    try:
        yield
    except (InvalidArgument, MemoryError) as error:
        raise error_of(error, labels) from error


def plan(
    models: Models, read: Read, session: Session, values: Sequence[Any]
) -> tuple[Path, list[tuple[str, GenerateRequest]]]:
    """Save the pictures, and return their folder and the request of each adapter."""
    names, form = read(values)
    folder = session.new_folder()
    request = form.request(models, folder)
    return folder, columns_of(models, request, names)


def columns_of(
    models: Models, request: GenerateRequest, names: Sequence[str]
) -> list[tuple[str, GenerateRequest]]:
    """Return the request of each adapter to compare."""
    conditions = [control.condition_name for control in request.controls]
    return list(models.requests(request, chosen(names, models, conditions)))


def save(folder: Path, name: str, request: GenerateRequest, generated: Generated) -> Made:
    """Write an image with its settings."""
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "image"
    file = folder / f"{word}-seed-{request.seed}.png"
    save_png(file, generated.image, generated.settings)
    return Made(name, file, request, generated.settings)


def start(listen: Any, page: Page, models: Models, read: Read) -> Any:
    """Make an event generate the images of the page."""

    async def run(session: Session, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        if session.job is not None:
            session.job.cancel()
        session.is_running = True
        try:
            async for update in updates_of(models, read, session, values):
                yield update
        finally:
            session.is_running = False

    outputs = [page.results, page.gallery, page.python, page.command, page.files, page.generate, page.cancel]
    return listen(
        run,
        [page.session, *page.values],
        outputs,
        show_progress="hidden",
        api_visibility="private",
        concurrency_id=DEVICE,
        concurrency_limit=1,
    )


async def updates_of(
    models: Models, read: Read, session: Session, values: Sequence[Any]
) -> AsyncIterator[tuple[Any, ...]]:
    """Generate, and yield what the page shows. The buttons change at the end, so as not to undo Cancel."""
    try:
        folder, columns = await asyncio.to_thread(plan, models, read, session, values)
    except InvalidArgument as error:
        yield gr.skip(), *_unchanged(), *_idle()
        raise error_of(error) from error
    board = session.board = Board([name for name, _ in columns])
    job = session.job = Job(models, [request for _, request in columns])
    failure: Exception | None = None
    async with aclosing(job.events()) as events:
        async for event in events:
            if isinstance(event, Finished):
                name, request = columns[event.place]
                made = await asyncio.to_thread(save, folder, name, request, event.generated)
                session.add(made)
                board.update(event, made.file)
            else:
                board.update(event)
            if isinstance(event, Ended):
                failure = event.error
                break
            yield shown(board.pictures, None), *_unchanged(), gr.skip(), gr.skip()
    selected = 0 if session.latest else None
    yield shown(board.pictures, selected), *_selected(session, selected), *_idle()
    if failure is not None:
        raise error_of(failure) from failure


def connect(page: Page, models: Models, read: Read, examples: Sequence[Any] = ()) -> None:
    """Connect Generate, Cancel and the images.

    Args:
        page: the components.
        models: the models.
        read: reads the page's values.
        examples: the events that fill in an example, which is then generated.
    """
    triggers = [page.generate.click, page.prompt.submit]
    light: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    buttons = [page.generate, page.cancel]

    def listen(*arguments: Any, **options: Any) -> Any:
        return gr.on(triggers, *arguments, **options)

    gr.on(triggers, _busy, None, buttons, **light)
    runs = [start(listen, page, models, read)]
    runs += [
        start(filled.then(_busy, None, buttons, **light).then, page, models, read) for filled in examples
    ]

    async def cancel(session: Session) -> None:
        """End a generation that runs, and wait for its end: its last update must not be lost."""
        if session.job is not None:
            session.job.cancel()
        for _ in range(_CANCEL_S * 50):
            if not session.is_running:
                return
            await asyncio.sleep(0.02)

    ended = page.cancel.click(cancel, page.session, None, **light)
    ended.then(None, cancels=runs)  # those that wait in the queue
    ended.then(_idle, None, buttons, **light)

    def choose_result(session: Session, event: gr.EventData) -> tuple[Any, ...]:
        place = _place(event, session.latest)
        pictures = session.board.pictures if session.board else []
        return shown(pictures, place), *_code(session, len(session.made) - session.latest + place)

    def choose_made(session: Session, event: gr.EventData) -> tuple[Any, ...]:
        place = _place(event, len(session.made))
        return _gallery(session, place), *_code(session, len(session.made) - 1 - place)

    code = [page.python, page.command, page.files]
    page.results.select(choose_result, page.session, [page.results, *code], **light)
    page.gallery.select(choose_made, page.session, [page.gallery, *code], **light)


def _place(event: gr.EventData, count: int) -> int:
    place = getattr(event, "index", None)
    if not isinstance(place, int) or not 0 <= place < count:
        raise gr.Error("This image is no longer there.", print_exception=False)
    return place


def _busy() -> tuple[Any, ...]:
    return gr.update(interactive=False), gr.update(interactive=True)


def _idle() -> tuple[Any, ...]:
    return gr.update(interactive=True), gr.update(interactive=False)


def _unchanged() -> tuple[Any, ...]:
    return (gr.skip(),) * 4


def _selected(session: Session, place: int | None) -> tuple[Any, ...]:
    if place is None:
        return _unchanged()
    return _gallery(session), *_code(session, len(session.made) - session.latest + place)


def _gallery(session: Session, selected: int | None = None) -> Any:
    pictures = [
        Picture(each.name, file=each.file, text=each.request.prompt) for each in reversed(session.made)
    ]
    return shown(pictures, selected)


def _code(session: Session, place: int) -> tuple[str, str, str]:
    made = session.made[place]
    files = [Path(file) for file in (*files_of(made.request), str(made.file))]
    links = " ".join(f'<a href="{address_of(file)}" download="{file.name}">{file.name}</a>' for file in files)
    return (
        python_code(made.request, made.settings),
        command_text(made.request),
        f"<p>Files that this code reads, and the image: {links}</p>",
    )
