"""Reports controls that never acted: the images are then those of the base alone."""

from __future__ import annotations

from nexus_adapters.errors import warn_caller


class ActingRecord:
    """Records whether a control acted during a generation.

    The end of a generation is known where the attachment is removed, and where the next one begins: there the
    position in the schedule goes back. `report` is called by then, and warns once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_reported = False
        self._forget()

    def _forget(self) -> None:
        self.acted = False
        self.positions: list[float] = []  # the first and the last, of calls in which it did not act

    def note(self, scale: float, position: float | None) -> None:
        """Record one call of the denoiser with the control's factor. `position`: None if unknown."""
        if position is not None and self.positions and position < self.positions[-1]:
            self.report()
        self.acted |= scale != 0
        if position is not None:
            self.positions = [*self.positions[:1], position]

    def report(self) -> None:
        """At the end of a generation: warn if the control was called for and never acted."""
        if self.positions and not self.acted and not self.has_reported:
            self.has_reported = True
            first, last = self.positions[0], self.positions[-1]
            warn_caller(
                f"{self.name} never acted: the sampler's steps lie at positions {first:.3g} to {last:.3g} of "
                "the schedule, where its start, end, and scale leave nothing to add"
            )
        self._forget()
