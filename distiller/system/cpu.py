"""What the processor has instructions for."""

from __future__ import annotations

import torch


def cpu_has(*capabilities: str) -> bool:
    """Whether the processor has any of these, by PyTorch's names.

    Older releases of PyTorch cannot tell; what they cannot tell of is not assumed.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in capabilities)
