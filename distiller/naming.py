"""Errors of files that are open already, which do not say of what file they are."""

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
