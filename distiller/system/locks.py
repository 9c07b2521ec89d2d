"""Locks between processes: locked files, which the kernel unlocks when the holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distiller.system.naming import errors_named

MAX_HOLDER = 300  # characters of a lock file's text that a message shows


class LockHeldError(Exception):
    """The error of a lock that another process holds; the message is its number, machine, start and command line."""


@contextmanager
def locked(path: Path, command: str, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold the lock file at ``path`` within the context, and remove the file at its end.

    A lock file that a crashed process left behind is not locked and delays nobody.

    Args:
        path: The lock file's path, in a directory that exists.
        command: What this process is doing, for the message to other processes that find the lock held.
        wait: Called with the holder's description before waiting for a lock that is held; without it, a lock that is
            held is an error.

    Raises:
        LockHeldError: another process holds the lock, and ``wait`` is None.
        OSError: the file cannot be made, or its file system has no locks; the error's ``filename`` is ``path``.
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
        path.unlink(missing_ok=True)  # before unlocking: a process that has it open then sees that it is gone
        os.close(descriptor)


def _acquire(path: Path, wait: Callable[[str], object] | None) -> int:
    """Lock the file at ``path`` and return its descriptor; try again if its last holder has removed it."""
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
    """Lock an open file; if another process holds the lock, wait for it or raise a ``LockHeldError``."""
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
    """Return whether the open file is still the one at ``path``, which its last holder may have removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
