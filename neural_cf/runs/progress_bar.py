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


class _PlainBar(tqdm):
    """A bar that is shown when its count is due, and once for each count."""

    _shown = -1

    def set_description(self, desc: str | None = None, refresh: bool = False) -> None:
        """Set the text before the count, which is shown with the next one."""
        super().set_description(desc, refresh=False)

    def set_postfix_str(self, s: str = "", refresh: bool = False) -> None:
        """Set the text behind the count, which is shown with the next one."""
        super().set_postfix_str(s, refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, unless it has been shown with this count."""
        if self.n != self._shown:
            super().display(msg, pos)
        self._shown = self.n


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
    disable = disable or sys.stderr is None  # it was closed when the process began
    common = {"total": total, "unit": unit, "initial": initial, "disable": disable}
    if disable or sys.stderr.isatty():
        return tqdm(**common, desc=description, mininterval=BAR_EVERY_S)
    return _PlainBar(
        **common,
        desc=f"{description}: ",
        mininterval=LINE_EVERY_S,
        maxinterval=2 * LINE_EVERY_S,
        delay=LINE_EVERY_S,
        file=_Lines(sys.stderr),
        bar_format=LINE_FORMAT,
    )
