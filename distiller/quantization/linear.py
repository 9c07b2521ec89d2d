"""Linear quantization as pure arithmetic, in float32.

The convention of this library, which is Distiller's:

    q = clamp(round(scale * x - zero_point), q_min, q_max)        x = (q + zero_point) / scale

So ``scale`` is quanta per unit, the inverse of what PyTorch and ONNX call scale, and ``zero_point`` has the
opposite sign of theirs. ``round`` is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class LinearQuantMode(Enum):
    """How a float range maps to integers; the value is the command line's name."""

    SYMMETRIC = "sym"
    SYMMETRIC_RESTRICTED = "sym_restr"
    ASYMMETRIC_UNSIGNED = "asym_u"
    ASYMMETRIC_SIGNED = "asym_s"

    @property
    def symmetric(self) -> bool:
        return self in (LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC_RESTRICTED)


@dataclass(frozen=True)
class QuantParams:
    """How a tensor is quantized.

    Attributes:
        scale: Quanta per unit, float32, broadcastable to the tensor.
        zero_point: Likewise, whole-numbered.
        q_min: The least integer.
        q_max: The greatest integer.
    """

    scale: Tensor
    zero_point: Tensor
    q_min: int
    q_max: int


def integer_range(bits: int, mode: LinearQuantMode) -> tuple[int, int]:
    """The least and the greatest integer of a mode at a number of bits."""
    if mode is LinearQuantMode.ASYMMETRIC_UNSIGNED:
        return 0, 2**bits - 1
    greatest = 2 ** (bits - 1) - 1
    return (-greatest if mode is LinearQuantMode.SYMMETRIC_RESTRICTED else -greatest - 1), greatest


def params_of_range(low: Tensor, high: Tensor, bits: int, mode: LinearQuantMode) -> QuantParams:
    """Scale and zero point that map float ranges onto integers.

    Args:
        low: Float32 lower bounds. Symmetric modes use max(|low|, |high|).
        high: Upper bounds, in the same shape. Asymmetric ranges are widened to contain 0.
        bits: 1 or more.
        mode: A zero-width range gives scale 1 in any mode.

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
    """``levels`` quanta for ``width``; scale 1 where that is 0, or so small that float32 cannot hold the scale.

    Raises:
        ValueError: a negative width.
    """
    if (width < 0).any():
        raise ValueError(f"negative width: {width.min()}")
    none = width <= levels / torch.finfo(torch.float32).max
    # Rounded twice, as PyTorch divides a number by a tensor. A single division differs in the last bit.
    return torch.where(none, levels, width).reciprocal() * levels


def quantize(x: Tensor, params: QuantParams) -> Tensor:
    """Whole-numbered float32 tensor of ``x``'s shape, clamped to the integer range."""
    return (params.scale * x).sub_(params.zero_point).round_().clamp_(params.q_min, params.q_max)


def dequantize(q: Tensor, params: QuantParams) -> Tensor:
    """The float32 values that integers stand for."""
    return (q + params.zero_point).div_(params.scale)


def fake_quantize(x: Tensor, params: QuantParams) -> Tensor:
    """``x`` as it looks after quantization: rounded and saturated, still in floats."""
    return dequantize(quantize(x, params), params)


def approximate_scale(scale: Tensor, bits: int | None) -> Tensor:
    """The nearest scale from below that a multiplier of ``bits`` bits and a shift can express.

    ``floor(scale * 2^h) / 2^h`` with ``h = floor(log2((2^bits - 1) / scale))``, element by element; unchanged
    where ``bits`` is None.
    """
    if bits is None:
        return scale
    shift = torch.floor(torch.log2(scale.reciprocal() * (2**bits - 1)))
    return torch.floor(scale * 2**shift) / 2**shift


def storage_dtype(q_min: int, q_max: int) -> torch.dtype:
    """The smallest integer type that holds [q_min, q_max] and that PyTorch computes with."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= q_min and q_max <= limits.max:
            return dtype
    return torch.int32
