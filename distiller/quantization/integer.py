"""Integer matrix products on the processor's own integer instructions, through ``torch._int_mm``.

Shapes: N rows, K input features, M output features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cli import InputError
from .wrappers import Operand, QuantizedLinear

MAX_BITS = 8
# torch._int_mm on CUDA wants more than 16 rows, and K and M in eights.
MIN_ROWS, MULTIPLE = 17, 8


class IntegerLinear(QuantizedLinear):
    """A ``QuantizedLinear`` whose products are of 8-bit integers with 32-bit sums.

    Both operands are shifted into int8, and the shifts taken out of the sums again:

        (x + a) . (w + b) = x . w + b sum(x) + a sum(w) + K a b

    with a and b the zero point and the shift. Equal, integer for integer, to what it derives from.

    Raises:
        InputError: activations or weights of more than 8 bits.
    """

    def _prepare_product(self, operand: Tensor) -> None:
        super()._prepare_product(operand)
        del self.operand
        _require_8_bits(*self.weight_range)
        if not self.dynamic:
            params = self._registered("input_0")
            _require_8_bits(params.q_min, params.q_max)
        shift = _shift(self.weight_range[0])
        weight = (self.weight.int() - shift).to(torch.int8)
        self.columns, self.depth = weight.shape
        padded = F.pad(weight, (0, -self.depth % MULTIPLE, 0, -self.columns % MULTIPLE))
        self.register_buffer("int8_weight", padded, persistent=False)
        self.register_buffer("weight_sum", weight.sum(1, dtype=torch.int32), persistent=False)
        self.register_buffer("weight_offset", self.w_zero_point.int() + shift, persistent=False)

    def product(self, x: Operand) -> Tensor:
        _require_8_bits(x.params.q_min, x.params.q_max)
        shift = _shift(x.params.q_min)
        rows = (x.q - shift).to(torch.int8)
        offset = x.params.zero_point.int() + shift
        padded = F.pad(rows, (0, -self.depth % MULTIPLE, 0, max(0, MIN_ROWS - len(rows))))
        total = torch._int_mm(padded, self.int8_weight.t())[: len(rows), : self.columns]
        row_sum = rows.sum(1, dtype=torch.int32, keepdim=True)
        total = total + self.weight_offset * (row_sum + self.depth * offset) + offset * self.weight_sum
        return total.to(self.exact_dtype)


def _require_8_bits(q_min: int, q_max: int) -> None:
    if q_max - q_min >= 1 << MAX_BITS:
        raise InputError(
            f"--qe-convert-pytorch: integer kernels take up to {MAX_BITS} bits, not {q_min} .. {q_max}"
        )


def _shift(q_min: int) -> int:
    """What to take from integers that start at ``q_min`` so that they fit int8."""
    return 128 if q_min == 0 else 0
