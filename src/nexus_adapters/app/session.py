"""What one open page has: its folder, its images, and the generation that runs for it."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from nexus_adapters.app.board import Board
from nexus_adapters.app.jobs import Job
from nexus_adapters.generation.requests import GenerateRequest

MOST_IMAGES = 60
"""Older images leave the gallery, and their files are deleted."""


@dataclass(frozen=True)
class Made:
    """An image of the gallery.

    Attributes:
        name: of the adapter, as on the page.
        file: the PNG file, which carries the settings.
        request: what it was generated from.
        settings: those in the file.
    """

    name: str
    file: Path
    request: GenerateRequest
    settings: dict[str, Any]


@dataclass
class Session:
    """The state of one open page. Gradio keeps it on the server.

    Attributes:
        used: conditions of the controls that have something on their canvases, by their places.
        made: the images, newest last.
        latest: number of images of the last generation.
        job: the generation that runs or has run last.
        is_running: whether a generation runs; not while it waits for others.
    """

    used: dict[int, str] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    latest: int = 0
    job: Job | None = None
    is_running: bool = False
    board: Board | None = None
    count: int = 0
    _folder: Path | None = None

    def new_folder(self) -> Path:
        """Create and return the folder of one generation."""
        if self._folder is None:
            self._folder = Path(get_upload_folder()) / f"nexus-{secrets.token_hex(16)}"
        self.count += 1
        self.latest = 0
        folder = self._folder / str(self.count)
        folder.mkdir(parents=True)
        return folder

    def add(self, made: Made) -> None:
        """Add an image to the gallery; the oldest may leave it."""
        self.made.append(made)
        self.latest += 1
        while len(self.made) > MOST_IMAGES:
            gone = self.made.pop(0)
            if all(each.file.parent != gone.file.parent for each in self.made):
                shutil.rmtree(gone.file.parent, ignore_errors=True)

    def close(self) -> None:
        """End what runs and delete the files."""
        if self.job is not None:
            self.job.cancel()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
