"""Progress bars: a moving bar on a terminal, and elsewhere a plain line every few seconds."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0  # a log of an hour's run then has 360 lines
BAR_EVERY_S = 0.5  # what stands beside a bar takes time to compute
LINE_FORMAT = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A file that takes what tqdm writes over and over in one place, and writes it as lines."""

    def __init__(self, file: TextIO):
        self._file = file
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._file.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._file.flush()


def progress_bar(total: int, description: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm:
    """Return a bar on stderr.

    Where stderr is no terminal it writes a plain line every ``LINE_EVERY_S``, and nothing for what takes less.

    Args:
        total: How many units there are.
        description: Text that stands before the bar.
        unit: What is counted.
        initial: How many units are done already.
        disable: Show nothing.
    """
    common = {"total": total, "desc": description, "unit": unit, "initial": initial, "disable": disable}
    if sys.stderr is None or sys.stderr.isatty():
        return tqdm(**common, mininterval=BAR_EVERY_S)
    waits = {"mininterval": LINE_EVERY_S, "maxinterval": 2 * LINE_EVERY_S, "delay": LINE_EVERY_S}
    return tqdm(**common, **waits, file=_Lines(sys.stderr), bar_format=LINE_FORMAT)
