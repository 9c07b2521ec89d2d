"""Running out of memory, on a processor or a GPU: told from other errors, so that less can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .cli import InputError

MEMORY_ERRORS = (MemoryError, RuntimeError)  # among which ``is_out_of_memory`` tells


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, a GPU or PyTorch's allocator on the processor, which has no error of its own, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turn running out of memory into an ``InputError``."""
    try:
        yield
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"out of memory: smaller -b/--batch-size, -f/--factors or --layers take less ({reason})"
        ) from error
