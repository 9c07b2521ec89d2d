"""Standard output with errors that name it, and no second error at exit for text that could not be written."""

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
    """A wrapper of standard output whose errors name it, and which escapes names that cannot be shown."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text; a character that the encoding lacks is an ``OSError`` too."""
        try:
            with errors_named(STDOUT):
                return self._stream.write(shown(text))
        except UnicodeEncodeError as error:
            reason = f"its encoding, {error.encoding}, has no {error.object[error.start]!a}"
            raise OSError(errno.EILSEQ, reason, STDOUT) from error

    def flush(self) -> None:
        """Flush the stream."""
        with errors_named(STDOUT):
            self._stream.flush()


@contextmanager
def output_named() -> Iterator[None]:
    """Make errors of standard output name it within the context, and flush it at the end, also after ``--help``.

    Raises:
        OSError: standard output cannot be written; the error's ``filename`` is ``STDOUT``.
    """
    if sys.stdout is None:  # closed by the parent process
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
    """Discard what standard output and error could not write, which Python would report once more at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
