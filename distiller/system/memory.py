"""Telling errors of running out of memory, on the CPU or a GPU, from all others."""

from __future__ import annotations

# What to catch; ``is_out_of_memory`` then tells which of these errors are about memory.
MEMORY_ERRORS = (MemoryError, RuntimeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that Python, NumPy, PyTorch on the CPU or PyTorch on a GPU ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    # ``torch.OutOfMemoryError`` by its name, so that a script without PyTorch need not import it. On the CPU PyTorch
    # raises a bare RuntimeError that names its allocator.
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (of_gpu or "DefaultCPUAllocator" in str(error))
