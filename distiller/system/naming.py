"""Names of files in messages: added to the errors of open files, and escaped where their bytes are no text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_named(name: str | os.PathLike) -> Iterator[None]:
    """Raise any ``OSError`` from within the context anew with ``name`` as its ``filename``."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from error


def shown(name: str) -> str:
    """Return a name as it can be printed and drawn, with lone surrogates escaped.

    Lone surrogates are how Python represents the bytes of a file's name that are not valid text.
    """
    return name.encode(errors="backslashreplace").decode()
