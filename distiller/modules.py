"""Arithmetic between tensors as modules, so that it has a name, statistics and a quantized form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concat(nn.Module):
    """Concatenation along ``dim``."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=self.dim)


class EltwiseAdd(nn.Module):
    """Sum of tensors of one shape, element by element."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        result = first
        for other in others:
            result = result + other
        return result


class EltwiseMult(nn.Module):
    """Product of tensors of one shape, element by element."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        result = first
        for other in others:
            result = result * other
        return result
