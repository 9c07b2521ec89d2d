"""Files that a stranger, or a full disk, could leave."""

from __future__ import annotations

import io
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from neural_cf import split as split_module
from neural_cf.split import Split


class Runs:
    """A value whose pickle is a call: loaded without care, it makes a file."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(marker: Path) -> dict[str, object]:
    return {
        "os.system": Runs(os.system, f"touch {marker}"),
        "open": Runs(open, str(marker), "w"),
        "eval": Runs(eval, f"open({str(marker)!r}, 'w')"),
        "touch": Runs(Path.touch, marker),
        "nested": [{"a": (Runs(os.system, f"touch {marker}"),)}],
    }


@contextmanager
def files_of_at_most(size: int):
    """As on a full disk: the process's files cannot grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def with_command(split: Split, where: str, marker: Path) -> bytes:
    """A split's pickle in which something would write ``marker`` if it were ever called."""
    touch = f"touch {marker}"
    command = {
        "system": Runs(os.system, touch),
        "eval": Runs(eval, f"__import__('os').system({touch!r})"),
        "open": Runs(open, str(marker), "w"),
        "getattr": Runs(getattr, os, "system"),
        "array of objects": np.array([Runs(os.system, touch)], dtype=object),
        "path": marker,
        "bytesio": io.BytesIO(b"x"),
    }[where]
    content = {"format": split_module.FORMAT, "version": split_module.VERSION} | vars(split)
    return pickle.dumps(content | {"digest": command}, protocol=2 if where == "array of objects" else 5)


COMMANDS = ["system", "eval", "open", "array of objects", "path", "bytesio"]


HEADERS = {"::": "", "\t": "", ",": "userId,movieId,rating,timestamp\n"}


def ratings(delimiter: str) -> str:
    """Three users with 20 ratings each, of 25 items."""
    rows = [[user, (7 * user + i) % 25, "3.5", 100 * user + i] for user in (1, 2, 3) for i in range(20)]
    return HEADERS[delimiter] + "".join(delimiter.join(map(str, row)) + "\n" for row in rows)
