"""Files that are whole or absent: written beside their place under another name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distiller.system.naming import errors_named

PART = ".part"  # what the names of unfinished files end in


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s directory; on success flush it to disk and rename it to ``path``.

    When the body raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OSError: the directory is missing, not writable or full; ``filename`` names ``path``.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield Path(name)
        # mkstemp makes files private; what is left behind should be as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, path)
        flush_directory(path.parent)
    except BaseException as error:
        # Gone where the rename was done.
        with suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush_directory(directory: Path) -> None:
    """Flush a directory's names to disk, where the file system can: a rename is then there after a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that flush no directories
            raise
    finally:
        os.close(descriptor)


def remove_parts(directory: Path) -> None:
    """Remove what killed processes left of unfinished files. Only where no other process is writing."""
    for path in directory.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def file_digest(*paths: str | os.PathLike) -> str:
    """SHA-256 of the files' bytes, one after the other, as ``sha256:`` and 64 hexadecimal digits.

    Raises:
        OSError: one cannot be read; ``filename`` names it.
    """
    digest = hashlib.sha256()
    for path in paths:
        with errors_named(path), open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
