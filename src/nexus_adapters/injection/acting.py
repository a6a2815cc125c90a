"""Report controls that never acted, which leave the base's images unchanged."""

from __future__ import annotations

from nexus_adapters.errors import warn_caller


class ActingRecord:
    """Records whether a control acted during a generation.

    A generation ends when the attachment is removed, or when the position in the schedule moves back because
    the next generation starts. `report` is called then, and warns once.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_reported = False
        self._forget()

    def _forget(self) -> None:
        self.acted = False
        self.positions: list[float] = []  # the first and the last position so far

    def note(self, scale: float, position: float | None) -> None:
        """Record one call of the denoiser. `scale` is the control's factor; `position` is None if unknown."""
        if position is not None and self.positions and position < self.positions[-1]:
            self.report()
        self.acted |= scale != 0
        if position is not None:
            self.positions = [*self.positions[:1], position]

    def report(self) -> None:
        """Warn, at the end of a generation, if the control never acted."""
        if self.positions and not self.acted and not self.has_reported:
            self.has_reported = True
            first, last = self.positions[0], self.positions[-1]
            warn_caller(
                f"{self.name} never acted: the sampler's steps are at positions {first:.3g} to {last:.3g} of "
                "the schedule, where the control is off because of its start, end or scale"
            )
        self._forget()
