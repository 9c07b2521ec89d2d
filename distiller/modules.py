"""Operations between tensors as modules, which gives each a name, calibration statistics and a quantized form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concat(nn.Module):
    """A concatenation of tensors along dimension ``dim``."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the tensors joined along ``dim``."""
        return torch.cat(tensors, dim=self.dim)


class EltwiseAdd(nn.Module):
    """An element-wise sum of tensors of one shape."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """Return the sum, added up from left to right."""
        result = first
        for other in others:
            result = result + other
        return result


class EltwiseMult(nn.Module):
    """An element-wise product of tensors of one shape."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """Return the product, multiplied from left to right."""
        result = first
        for other in others:
            result = result * other
        return result
