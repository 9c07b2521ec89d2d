"""The arithmetic of linear quantization: floats to integers and back, in float32.

This library has the convention of Distiller:

    q = clamp(round(scale * x - zero_point), q_min, q_max)        x = (q + zero_point) / scale

So ``scale`` is in quanta (steps of the integer) per unit, the inverse of what PyTorch and ONNX call scale, and
``zero_point`` has the opposite sign of theirs. ``round`` rounds halves to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class LinearQuantMode(Enum):
    """A way to map a float range to integers. The value of a member is its name on the command line."""

    SYMMETRIC = "sym"
    SYMMETRIC_RESTRICTED = "sym_restr"
    ASYMMETRIC_UNSIGNED = "asym_u"
    ASYMMETRIC_SIGNED = "asym_s"

    @property
    def symmetric(self) -> bool:
        """Whether the range lies evenly around 0, so that the zero point is 0."""
        return self in (LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC_RESTRICTED)


@dataclass(frozen=True)
class QuantParams:
    """The parameters by which a tensor is quantized.

    Attributes:
        scale: Quanta per unit, float32, broadcastable to the tensor.
        zero_point: Whole numbers, float32, broadcastable to the tensor.
        q_min: The least integer.
        q_max: The greatest integer.
    """

    scale: Tensor
    zero_point: Tensor
    q_min: int
    q_max: int


def integer_range(bits: int, mode: LinearQuantMode) -> tuple[int, int]:
    """Return the least and the greatest integer that a mode has at a number of bits."""
    if mode is LinearQuantMode.ASYMMETRIC_UNSIGNED:
        return 0, 2**bits - 1
    greatest = 2 ** (bits - 1) - 1
    return (-greatest if mode is LinearQuantMode.SYMMETRIC_RESTRICTED else -greatest - 1), greatest


def params_of_range(low: Tensor, high: Tensor, bits: int, mode: LinearQuantMode) -> QuantParams:
    """Return the scale and the zero point that map float ranges onto integers.

    A range of zero width gives scale 1.

    Args:
        low: Lower bounds, float32. Symmetric modes take the range from -r to r with r = max(|low|, |high|).
        high: Upper bounds, float32, in the shape of ``low``. Asymmetric ranges are widened to contain 0.
        bits: The width of the integers, 1 or more.
        mode: How the range is mapped.

    Raises:
        ValueError: an asymmetric range is upside down, or the mode has no level but 0 at these bits.
    """
    low, high = low.float(), high.float()
    q_min, q_max = integer_range(bits, mode)
    if mode.symmetric:
        levels = q_max if mode is LinearQuantMode.SYMMETRIC_RESTRICTED else (2**bits - 1) / 2
        if not levels:
            raise ValueError(f"{mode.value} at {bits} bit has no level but 0")
        scale = scale_of_width(torch.maximum(low.abs(), high.abs()), levels)
        return QuantParams(scale, torch.zeros_like(low), q_min, q_max)
    if (low > high).any():
        raise ValueError(f"upside-down range: {low[low > high][0]} > {high[low > high][0]}")
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = scale_of_width(high - low, 2**bits - 1)
    zero_point = torch.round(scale * low)
    if mode is LinearQuantMode.ASYMMETRIC_SIGNED:
        zero_point = zero_point + 2 ** (bits - 1)
    return QuantParams(scale, zero_point, q_min, q_max)


def scale_of_width(width: Tensor, levels: float) -> Tensor:
    """Return the scale ``levels / width``, in quanta per unit.

    It is 1 where the width is 0, or so small that float32 cannot hold the scale.

    Raises:
        ValueError: a width is negative.
    """
    if (width < 0).any():
        raise ValueError(f"negative width: {width.min()}")
    none = width <= levels / torch.finfo(torch.float32).max
    # Two roundings, one in the reciprocal and one in the product: PyTorch divides a number by a tensor in this way.
    # A single division differs in the last bit.
    return torch.where(none, levels, width).reciprocal() * levels


def quantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return the integers of a float tensor: whole numbers in float32 of its shape, clamped to the integer range."""
    return (params.scale * x).sub_(params.zero_point).round_().clamp_(params.q_min, params.q_max)


def dequantize(q: Tensor, params: QuantParams) -> Tensor:
    """Return the float32 values that integers stand for."""
    return (q + params.zero_point).div_(params.scale)


def fake_quantize(x: Tensor, params: QuantParams) -> Tensor:
    """Return ``x`` quantized and dequantized: rounded to the levels and saturated at the ends, still in floats."""
    return dequantize(quantize(x, params), params)


def approximate_scale(scale: Tensor, bits: int | None) -> Tensor:
    """Return the largest scale up to this one that a multiplier of ``bits`` bits and a shift can express.

    It is ``floor(scale * 2^h) / 2^h`` with ``h = floor(log2((2^bits - 1) / scale))``, element by element. Where
    ``bits`` is None, the scale is returned unchanged.
    """
    if bits is None:
        return scale
    shift = torch.floor(torch.log2(scale.reciprocal() * (2**bits - 1)))
    return torch.floor(scale * 2**shift) / 2**shift


def storage_dtype(q_min: int, q_max: int) -> torch.dtype:
    """Return the smallest integer type of PyTorch that holds [q_min, q_max]."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= q_min and q_max <= limits.max:
            return dtype
    return torch.int32
