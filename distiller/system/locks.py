"""Locks between processes: files that the kernel unlocks when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distiller.system.naming import errors_named

MAX_HOLDER = 300  # characters of a lock file's text that are shown


class LockHeldError(Exception):
    """Another process has the lock. The message says which: its number, machine, start and command line."""


@contextmanager
def locked(path: Path, command: str, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold the lock file at ``path`` alone. It goes when it is given back; one that a crash left holds nobody up.

    Args:
        path: In a directory that exists.
        command: What the holder is doing, for whoever finds the lock taken.
        wait: Called with the holder, when there is one, before waiting for it; by default nobody waits.

    Raises:
        LockHeldError: another process holds it.
        OSError: the file cannot be made, or locks do not work there; ``filename`` names it.
    """
    with errors_named(path):
        descriptor = _acquire(path, wait)
    try:
        with errors_named(path):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            text = f"process {os.getpid()} on {platform.node()} since {since}: {command}"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(errors="replace"), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile sees that it is gone
        os.close(descriptor)


def _acquire(path: Path, wait: Callable[[str], object] | None) -> int:
    """The descriptor of the locked file, which is still the one at ``path``."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, wait)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, wait: Callable[[str], object] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, MAX_HOLDER, 0).decode(errors="replace")
        holder = "".join(c if c.isprintable() else " " for c in text) or "another process"
        if wait is None:
            raise LockHeldError(holder) from None
        wait(holder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file is not one that its last holder took away."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
