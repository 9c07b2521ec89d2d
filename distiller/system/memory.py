"""Running out of memory, on a processor or a GPU: told from other errors, so that less can be tried."""

from __future__ import annotations

MEMORY_ERRORS = (MemoryError, RuntimeError)  # among which ``is_out_of_memory`` tells


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, a GPU or PyTorch's allocator on the processor, which has no error of its own, ran out."""
    if isinstance(error, MemoryError):
        return True
    # ``torch.OutOfMemoryError`` by its name: not every script waits for PyTorch to be loaded.
    of_gpu = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (of_gpu or "DefaultCPUAllocator" in str(error))
