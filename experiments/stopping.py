"""Ctrl-C and SIGTERM: outside of training they end the command, in training the step is finished first.

    noted = Noted()
    with note_signals(noted):
        ...                  # noted.signal is the one that came, or 0

A second signal ends the command at once. Free of torch.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: A launcher hands on what its processes have got already, so this soon after the first a signal is the same one.
ECHO = 1.0  # seconds


class Stopped(KeyboardInterrupt):
    """A signal ended the work; `outcome` says what became of it, if more is known than the command knows."""

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(outcome)
        self.signal, self.outcome = signal.Signals(number), outcome

    @property
    def cause(self) -> str:
        return "interrupted" if self.signal == signal.SIGINT else "terminated"


@dataclass
class Noted:
    """The signal that asks the run to stop; 0 for none."""

    signal: int = 0


def raise_stopped(number: int, frame: object) -> None:
    raise Stopped(number)


@contextmanager
def note_signals(noted: Noted) -> Iterator[None]:
    """A context in which the first signal is only noted."""
    came = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal came
        if not noted.signal:
            noted.signal, came = number, time.monotonic()
        elif time.monotonic() - came > ECHO:
            raise Stopped(number)

    with handled_by(note):
        yield


@contextmanager
def handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """A context in which `handler` gets the signals; only the main thread can set it, and elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
