"""Files that are either complete or absent: written under a temporary name, then renamed; and file digests."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distiller.system.naming import errors_named

PART = ".part"  # the end of the names of unfinished files


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s directory; on success flush it to disk and rename it to ``path``.

    When the body raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OSError: the directory is missing, not writable or full; the error's ``filename`` is ``path``.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield Path(name)
        # mkstemp makes files private; the final file should be as readable as any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, path)
        flush_directory(path.parent)
    except BaseException as error:
        # After the rename the temporary name no longer exists.
        with suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power cut.

    A file system that cannot flush directories is left as it is.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of file systems that cannot flush directories
            raise
    finally:
        os.close(descriptor)


def remove_parts(directory: Path) -> None:
    """Remove the unfinished files that killed processes left; no other process may be writing there."""
    for path in directory.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


def file_digest(*paths: str | os.PathLike) -> str:
    """Return the SHA-256 of the files' bytes, one file after the other, as ``sha256:`` and 64 hexadecimal digits.

    Raises:
        OSError: a file cannot be read; the error's ``filename`` names it.
    """
    digest = hashlib.sha256()
    for path in paths:
        with errors_named(path), open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
