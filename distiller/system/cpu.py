"""The instruction sets of the processor."""

from __future__ import annotations

import torch


def cpu_has(*capabilities: str) -> bool:
    """Return whether the processor has any of these capabilities, by PyTorch's names for them.

    A capability that the installed release of PyTorch cannot report counts as absent.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in capabilities)
