"""SIGINT and SIGTERM: the first can wait until a step is finished, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises, as SIGINT raises a ``KeyboardInterrupt``."""


def interruption(number: int) -> KeyboardInterrupt:
    """Return the exception that stands for a signal, SIGINT or SIGTERM."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Make SIGTERM raise ``Terminated`` within the context, so that unfinished work is cleaned up."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DeferredSignals:
    """A context in which the first SIGINT or SIGTERM is only recorded, and a second ends the process at once.

    A signal that was ignored before stays ignored.

    Attributes:
        received: The number of the first signal; None while there has been none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raising = False

    def __enter__(self) -> DeferredSignals:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise the first signal within this inner context, also if it came before: for work that may be cut short."""
        self._raising = True
        try:
            if self.received is not None:
                raise interruption(self.received)
            yield
        finally:
            self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record the signal, and leave the next one to the system, which ends the process."""
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self._raising:
            raise interruption(number)
        with suppress(OSError):  # stderr may be closed
            # Not by print, which the signal may have interrupted.
            os.write(2, b"\nFinishing the step and saving; a second signal ends at once.\n")
