"""SIGINT and SIGTERM: what must not be cut short is finished first, and a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come, as a ``KeyboardInterrupt`` says that SIGINT has."""


def interruption(number: int) -> KeyboardInterrupt:
    """What a signal is raised as."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """While it lasts, SIGTERM raises ``Terminated``, so that what is half done is cleaned up."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DeferredSignals:
    """While it lasts, the first SIGINT or SIGTERM is noted and not acted on; a second one ends the process at once.

    A signal that was ignored before stays ignored.

    Attributes:
        received: The first signal; None so far.
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
        """While it lasts, the first signal is raised, also one that came before: of work that may be cut short."""
        self._raising = True
        try:
            if self.received is not None:
                raise interruption(self.received)
            yield
        finally:
            self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self._raising:
            raise interruption(number)
        with suppress(OSError):  # stderr may be closed
            # Not by print, in the midst of which the signal may have come.
            os.write(2, b"\nFinishing the step and saving; a second signal ends at once.\n")
