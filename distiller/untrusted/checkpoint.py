"""Checkpoints: saved completely or not at all, and loaded without running any code that is in them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distiller.system.cli import InputError
from distiller.system.files import atomic_write
from distiller.untrusted.claims import check_claims
from distiller.untrusted.unpickling import UnknownNameError

# Checkpoints of the original implementation hold more than tensors and plain values: the optimizer's class, and metrics
# as NumPy scalars, which NumPy 1 pickles under a module name of its own.
_build_scalar, _ = np.float64(0).__reduce__()
ALLOWED_TYPES = [
    torch.optim.Adam,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    (_build_scalar, "numpy._core.multiarray.scalar"),
    (_build_scalar, "numpy.core.multiarray.scalar"),
]


def save_checkpoint(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it, so that ``path`` is a whole file at every instant.

    Raises:
        OSError: the file cannot be written; what was at ``path`` before is still there.
    """
    # Into an open file: Python's write errors name their cause, those of torch's own writer do not.
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # After a failed write torch still closes its archive, whose own failure hides the write's error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint of tensors, plain values and ``ALLOWED_TYPES`` onto the CPU.

    Returns:
        The checkpoint's dictionary, with at least a ``state_dict`` of tensors.

    Raises:
        InputError: the file is not a checkpoint, is cut short, holds anything else, or claims to hold more data than it
            does.
        OSError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            check_claims(file)
        with torch.serialization.safe_globals(ALLOWED_TYPES), warnings.catch_warnings():
            # What torch warns of in a damaged file, the error that follows says too.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can make torch raise nearly any exception; all mean the same, except for a file that is unreadable.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise InputError(f"{path}: {_reason(error)}") from error
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    tensors = isinstance(state_dict, Mapping) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in state_dict.items()
    )
    if not tensors:
        raise InputError(f"{path}: not a checkpoint: it holds no state_dict of tensors")
    return content


def _reason(error: Exception) -> str:
    """Return why a checkpoint was refused, in one line."""
    if isinstance(error, UnknownNameError):
        return f"refused: it holds {error}, which is neither a tensor nor a plain value"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not a checkpoint, or cut short: {lines[0].split('. ')[0]}"
