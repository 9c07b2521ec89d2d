"""Files that are whole or absent: written beside their place under another name, then renamed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .cli import InputError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in ``path``'s directory; on success flush it to disk and rename it to ``path``.

    When the body raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OSError: the directory is missing, not writable or full; ``filename`` names ``path``.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
    except OSError as error:
        os.unlink(name)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        os.unlink(name)
        raise


def read_yaml(path: str | os.PathLike, flag: str) -> Any:
    """A YAML file's content, plain values only.

    Raises:
        InputError: not YAML; the message begins with ``flag``, which named the file.
        OSError: it cannot be read; the message names ``flag`` too.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{flag}: {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{flag}: {path}: not YAML: {' '.join(str(error).split())}") from error


def file_digest(*paths: str | os.PathLike) -> str:
    """SHA-256 of the files' bytes, one after the other, as ``sha256:`` and 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
