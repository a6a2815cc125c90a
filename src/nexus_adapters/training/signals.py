"""Ctrl-C and SIGTERM: the step is finished and saved, and only then the run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Stopped(Exception):  # noqa: N818  # not an error: the run was asked to
    """The run was asked to stop and has saved. `exit_status` is what a shell expects: 130 or 143."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.exit_status = 128 + signal_number
        self.step = step
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}, which is saved")


@dataclass
class StopRequest:
    """`signal_number` of the first signal that came; 0 for none."""

    signal_number: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, SIGINT and SIGTERM are noted and do nothing else; a second SIGINT acts at once.

    A second SIGTERM does not: schedulers and launchers send it to a process more than once.

    In a thread other than the main one, which cannot handle signals, none is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_number == number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_number = request.signal_number or number

    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
