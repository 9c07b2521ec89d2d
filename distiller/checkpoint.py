"""Checkpoints: saved whole or not at all, loaded without running anything that is in them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .cli import InputError
from .files import atomic_write

# What checkpoints of the original hold beside tensors and plain values: the optimizer's class, and metrics
# as NumPy scalars, pickled by NumPy 1 under a module name of its own.
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
    """Write ``content`` to ``path`` under a temporary name first, so that ``path`` is whole at every instant.

    Raises:
        OSError: the directory cannot be written; what was at ``path`` is still there.
    """
    with atomic_write(path) as temporary:
        torch.save(dict(content), temporary)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: tensors, plain values and ``ALLOWED_TYPES`` only.

    Returns:
        A dictionary with at least a ``state_dict`` of tensors.

    Raises:
        InputError: not a checkpoint, cut short, or it holds anything else.
        OSError: it cannot be read.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged file can make torch raise nearly anything; all of it means the same here.
    except Exception as error:
        raise InputError(f"{path}: {_reason(error)}") from error
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, Mapping) or not all(map(torch.is_tensor, state_dict.values())):
        raise InputError(f"{path}: not a checkpoint: it holds no state_dict of tensors")
    return content


def _reason(error: Exception) -> str:
    refused = re.search(r"(?:GLOBAL|Unsupported class|Unsupported operand) (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return f"refused: it holds {refused[1]}, which is neither a tensor nor a plain value"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"not a checkpoint, or cut short: {lines[0]}"
