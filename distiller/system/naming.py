"""Files' names: in errors of open files, which do not have them, and as text where they have bytes that are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_named(name: str | os.PathLike) -> Iterator[None]:
    """Make an ``OSError`` name a file: ``filename`` is ``name``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from error


def shown(name: str) -> str:
    """A name as it can be printed and drawn: lone surrogates, Python's form of bytes that are no text, are escaped."""
    return name.encode(errors="backslashreplace").decode()
