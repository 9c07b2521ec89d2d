"""Standard output: its errors name it, and what it did not take is dropped without a second error at the end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from distiller.system.naming import errors_named, shown

STDOUT = "standard output"


class _Output:
    """A text stream whose errors name standard output, and which is given names as they can be shown."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            with errors_named(STDOUT):
                return self._stream.write(shown(text))
        except UnicodeEncodeError as error:
            reason = f"its encoding, {error.encoding}, has no {error.object[error.start]!a}"
            raise OSError(errno.EILSEQ, reason, STDOUT) from error

    def flush(self) -> None:
        with errors_named(STDOUT):
            self._stream.flush()


@contextmanager
def output_named() -> Iterator[None]:
    """While it lasts, errors of standard output name it; at the end, also after ``--help``, all of it is written.

    Raises:
        OSError: it cannot be written; ``filename`` is ``STDOUT``.
    """
    if sys.stdout is None:  # closed by whoever started this
        yield
        return
    output = _Output(sys.stdout)
    with redirect_stdout(output):
        try:
            yield
        except SystemExit:
            output.flush()
            raise
        output.flush()


def drop_unwritten() -> None:
    """Send to nowhere what standard output and error did not take, which Python would complain of once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
