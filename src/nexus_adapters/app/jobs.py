"""A generation in a thread of its own: its progress, its images, and how to end it within a step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nexus_adapters.app.models import Generated, Models
from nexus_adapters.errors import InvalidArgument
from nexus_adapters.generation.requests import GenerateRequest
from nexus_adapters.generation.steps import Step

if TYPE_CHECKING:
    from PIL import Image

PREVIEW_SHARE = 0.05
"""Share of the time that previews may cost."""


class CancelledError(Exception):
    """The user cancelled the generation."""


@dataclass(frozen=True)
class Progress:
    """A step of one image.

    Attributes:
        place: index of the image's request.
        index: of the step, from 1; 0 before the first.
        total: number of steps.
        preview: a small picture of the image so far; None for no new one.
    """

    place: int
    index: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """One image is there."""

    place: int
    generated: Generated


@dataclass(frozen=True)
class Ended:
    """The end of the generation: with an error, by the user, or with all images."""

    error: Exception | None = None
    is_cancelled: bool = False


Event = Progress | Finished | Ended


class Job:
    """Generates the image of each request, one after the other.

    Args:
        models: the models.
        requests: the requests.
    """

    def __init__(self, models: Models, requests: Sequence[GenerateRequest]) -> None:
        self._models = models
        self._requests = tuple(requests)
        self._cancelled = threading.Event()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def cancel(self) -> None:
        """End the generation after the step that runs now."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the user cancelled it."""
        return self._cancelled.is_set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Generate, and yield what happens; of the steps that nobody waited for, the last one.

        Leaving the loop early cancels the generation.
        """
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        threading.Thread(target=self._run, args=(send,), daemon=True, name="generation").start()
        try:
            while True:
                event = await self._events.get()
                while isinstance(event, Progress) and not self._events.empty():
                    event = _latest(event, self._events.get_nowait())
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self.cancel()

    def _run(self, send: Callable[[Event], None]) -> None:
        try:
            for place, request in enumerate(self._requests):
                previews = _Previews()

                def on_step(step: Step, place: int = place, previews: _Previews = previews) -> None:
                    if self._cancelled.is_set():
                        raise CancelledError
                    send(Progress(place, step.index, step.total, previews.of(step)))

                if self._cancelled.is_set():
                    raise CancelledError
                send(Progress(place, 0, request.steps))
                send(Finished(place, self._models.generate(request, on_step)))
        except CancelledError:
            send(Ended(is_cancelled=True))
        except (InvalidArgument, MemoryError, OSError, ValueError, RuntimeError, FloatingPointError) as error:
            send(Ended(error))
        except BaseException:
            send(Ended(RuntimeError("the generation failed")))
            raise
        else:
            send(Ended())


class _Previews:
    """Decides which steps are shown: never the last, and no more than a share of the time allows."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._spent_s = 0.0

    def of(self, step: Step) -> Image.Image | None:
        """Return a small picture of this step, or None to save time."""
        now_s = time.perf_counter()
        if step.index == step.total or self._spent_s > PREVIEW_SHARE * (now_s - self._start_s):
            return None
        preview = step.preview()
        self._spent_s += time.perf_counter() - now_s
        return preview


def _latest(event: Progress, later: Event) -> Event:
    """Return the later one of two events, with the earlier one's preview if it has none of its own."""
    if isinstance(later, Progress) and later.preview is None and later.place == event.place:
        return replace(later, preview=event.preview)
    return later
