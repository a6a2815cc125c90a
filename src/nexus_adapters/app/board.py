"""The images of one generation while it runs: which are done, which step the next one is at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nexus_adapters.app.jobs import Ended, Event, Finished, Progress
from nexus_adapters.app.pictures import Picture


class Board:
    """A place for each image.

    Args:
        names: of the adapters.
        text: what is shown until the first step.
    """

    def __init__(self, names: Sequence[str], text: str = "waiting") -> None:
        self.pictures = [Picture(name, text=text) for name in names]
        self.is_done = False

    def update(self, event: Event, file: Path | None = None) -> None:
        """Show what has happened; `file` is that of a finished image."""
        if isinstance(event, Ended):
            self.end("cancelled" if event.is_cancelled else "failed")
        elif isinstance(event, Finished):
            self.pictures[event.place] = Picture(self.pictures[event.place].name, file=file)
        else:
            self.pictures[event.place] = self._at_step(event)

    def end(self, text: str) -> None:
        """Show that the images which are not done will not come."""
        self.is_done = True
        self.pictures = [
            picture if picture.file else replace(picture, preview=None, share=None, text=text)
            for picture in self.pictures
        ]

    def _at_step(self, event: Progress) -> Picture:
        before = self.pictures[event.place]
        text = f"step {event.index} of {event.total}" if event.index else "starting"
        return replace(
            before, share=event.index / event.total, text=text, preview=event.preview or before.preview
        )
