"""Linear layers of a prepared model on 8-bit integers with 32-bit sums, equal to what its wrappers simulate in floats.

The wrappers' integers q are whole numbers in float32. Products take them as codes, which are int8: a code is q - s,
with a shift s that moves unsigned integers into int8's range. Inputs of 9 to 16 bits are two codes, x = 256 h + l, and
two products. Shapes: N rows, K input features, M output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller.quantization.linear import QuantParams, approximate_scale, dequantize, quantize
from distiller.quantization.wrappers import (
    ACCUMULATOR_BITS,
    EXACT_IN_FLOAT32,
    AccumulatingModule,
    FakeQuantized,
    QuantizedConcat,
    QuantizedLinear,
    ScaledConcat,
    saturate,
)
from distiller.system.cpu import cpu_has

BITS = 8  # of a code
DIGIT = 1 << BITS  # what the higher of two codes counts
SCALES_AT_ONCE = 1 << 14  # 16 MB for 256 levels of each
# torch._int_mm on CUDA wants more than 16 rows, and K and M in eights. AMX works in sixteens: on two cores 4000 x 256
# took 0.159 ms by 136 columns, 0.133 by 144 and 0.126 by 128 (2026-11-23).
MIN_ROWS, MULTIPLE = 17, 16
LARGEST_SUM = 1 << 31
EXACT_FEATURES = EXACT_IN_FLOAT32 >> 14  # whose products of codes float32 adds without error


class NotIntegerError(ValueError):
    """What 32-bit sums of products of integers cannot compute; the message says why."""


def require_levels(name: str, params: QuantParams) -> None:
    """Raise a ``NotIntegerError`` unless all of these integers are told apart in float32.

    The wrappers hand on floats and quantize them again. That changes nothing wherever this does not raise.
    """
    q = torch.arange(params.q_min, params.q_max + 1, dtype=torch.float32, device=params.scale.device)
    columns = zip(
        *(x.reshape(-1, 1).split(SCALES_AT_ONCE) for x in (params.scale, params.zero_point)), strict=True
    )
    for scale, zero_point in columns:
        some = QuantParams(scale, zero_point, params.q_min, params.q_max)
        if not (quantize(dequantize(q, some), some) == q).all():
            raise NotIntegerError(f"layer {name} has a range that float32 does not tell its levels apart in")


def levels_of(params: QuantParams) -> int:
    """How many integers there are."""
    return params.q_max - params.q_min + 1


def code_shift(q_min: int, levels: int) -> int:
    """What to take from so many integers that start at ``q_min``, so that they are codes or two codes each."""
    middle = levels // 2 if q_min == 0 else 0
    if levels <= DIGIT:
        return DIGIT // 2 if middle else 0
    return middle + DIGIT // 2  # since the lower code starts at -128


def largest_terms(levels: int) -> int:
    """What a feature of so many integers adds at most to the terms of a product.

    In magnitude, the codes and offsets of a weight are at most 128, those of an input half its levels, and 128 more if
    there are two codes of it.
    """
    reach = DIGIT // 2 if levels <= DIGIT else levels // 2 + DIGIT // 2
    return 4 * reach * (DIGIT // 2)


def zero_point_of(params: QuantParams, columns: slice) -> float:
    """The zero point that some columns have in common."""
    return (params.zero_point[columns] if params.zero_point.numel() > 1 else params.zero_point)[0].item()


def product_dtype(features: int, device: torch.device) -> torch.dtype:
    """What the products of so many features are computed in: int8 where the hardware has it, else what is exact."""
    if device.type == "cuda" or cpu_has("avx512_vnni", "avx_vnni", "amx_int8"):
        return torch.int8
    return torch.float32 if features <= EXACT_FEATURES else torch.float64


def code_product(codes: Tensor, weight: Tensor) -> Tensor:
    """The matrix product of codes (N, K) int8 and a weight's (K, M), in its ``product_dtype``: int32, exact.

    K and M are in sixteens.
    """
    if weight.dtype is not torch.int8:
        return (codes.to(weight.dtype) @ weight).to(torch.int32)
    rows = len(codes)
    if rows < MIN_ROWS:
        codes = F.pad(codes, (0, 0, 0, MIN_ROWS - rows))
    return torch._int_mm(codes, weight)[:rows]


class IntegerProduct:
    """What some of a quantized linear layer's input features add to its sums: (q_x + zp_x) . (q_w + zp_w).

    With x = q_x - s and w = q_w - t, and offsets a = zp_x + s and b = zp_w + t, that is

        (x + a) . (w + b) = x . w + b sum(x) + a sum(w) + K a b.

    The last two terms are constant. w is a code; x is one or, of more than 8 bits, 256 h + l of two.

    Args:
        linear: The layer.
        columns: Its input features.
        bias: Add the layer's bias.
        dtype: Of the sums, int32 or, where it holds all of the layer's without error, float32.
    """

    def __init__(self, linear: QuantizedLinear, columns: slice, bias: bool, dtype: torch.dtype):
        inputs, (w_min, w_max) = linear.fixed_input(0), linear.weight_range
        levels, w_shift = levels_of(inputs), code_shift(w_min, w_max - w_min + 1)
        self._wide, self._shift = levels > DIGIT, code_shift(inputs.q_min, levels)
        weight = (linear.weight[:, columns].int() - w_shift).to(torch.int8)
        self._outputs, depth = weight.shape
        a = int(zero_point_of(inputs, columns)) + self._shift
        b = linear.w_zero_point.int() + w_shift
        constant = a * weight.sum(1, dtype=torch.int32) + depth * a * b
        if bias and linear.bias is not None:
            constant += linear.bias.int()
        # The terms may be larger than their sum is.
        largest = depth * largest_terms(levels) + constant.abs().max().item()
        self._dtype, self._term_dtype = dtype, dtype if largest <= EXACT_IN_FLOAT32 else torch.int32
        self._constant = constant.to(self._term_dtype)
        self._row_offset = b.to(self._term_dtype) if b.any() else None
        self._padding = -depth % MULTIPLE
        weight = F.pad(weight, (0, self._padding, 0, -len(weight) % MULTIPLE))
        self._weight = weight.to(product_dtype(depth, weight.device)).t()

    def __call__(self, q: Tensor) -> Tensor:
        """(N, M) of (N, K) whole numbers in float32, which are overwritten."""
        if self._shift:
            q.sub_(self._shift)
        sums = self._product(q).to(self._term_dtype) + self._constant
        if self._row_offset is not None:
            sums.addcmul_(q.sum(1, keepdim=True).to(self._term_dtype), self._row_offset)
        return sums.to(self._dtype)

    def _product(self, x: Tensor) -> Tensor:
        """(N, M) int32, the first term."""
        if self._wide:
            integers = x.to(torch.int32)
            low = self._code_product(integers)  # whose last byte is the lower code
            return low.add_(
                self._code_product(integers.add_(DIGIT // 2).bitwise_right_shift_(BITS)), alpha=DIGIT
            )
        # Compiled, float32 to int8 at once takes 0.45 ms, by way of int32 0.39 (4000 x 256, with its sums).
        return self._code_product(x.to(torch.int32) if torch.compiler.is_compiling() else x)

    def _code_product(self, x: Tensor) -> Tensor:
        codes = x.to(torch.int8)
        if self._padding:
            codes = F.pad(codes, (0, self._padding))
        return code_product(codes, self._weight)[:, : self._outputs]


class WideProduct:
    """What some of a quantized linear layer's input features add to its sums, at any bits, where these fit 32 bits.

    In float64, which takes long: for what is computed once and not for every pair.

    Args:
        linear: The layer.
        columns: Its input features.
        bias: Add the layer's bias.
    """

    def __init__(self, linear: QuantizedLinear, columns: slice, bias: bool):
        self._zero_point = zero_point_of(linear.fixed_input(0), columns)
        self._weight = linear.operand[:, columns].double()
        self._bias = linear.bias.double() if bias and linear.bias is not None else None

    def __call__(self, q: Tensor) -> Tensor:
        """(N, M) int32 of (N, K) whole numbers in float32."""
        return F.linear(q.double() + self._zero_point, self._weight, self._bias).to(torch.int32)


class SingleOutput:
    """What some of the input features add to the sum of a layer of one output, where float32 holds it without error.

    A matrix product of one column would be computed as one of sixteen.

    Args:
        linear: The layer.
        columns: Its input features.
        bias: Add the layer's bias.
    """

    def __init__(self, linear: QuantizedLinear, columns: slice, bias: bool):
        self._zero_point = zero_point_of(linear.fixed_input(0), columns)
        self._weight = linear.operand[0, columns]
        self._bias = linear.bias if bias else None

    def __call__(self, q: Tensor) -> Tensor:
        """(N, 1) whole numbers in float32 of (N, K) such, which are overwritten."""
        if self._zero_point:
            q.add_(self._zero_point)
        sums = q.mul_(self._weight).sum(1, keepdim=True)
        return sums if self._bias is None else sums.add_(self._bias)


def require_finite(name: str, factors: Tensor) -> None:
    """Raise a ``NotIntegerError`` unless these factors between a layer's scales are numbers."""
    if not torch.isfinite(factors).all():
        raise NotIntegerError(f"layer {name} has a factor between scales that float32 does not hold")


class Requantizer:
    """From a layer's sums to its output's integers, by the wrapper's float32 operations in their order.

    Args:
        name: Of the layer.
        layer: With fixed ranges.
        scale: Of the sums, in quanta per unit; None where every row has its own, given with it.
        bits: Of the sums, which saturate there.

    Raises:
        NotIntegerError: float32 cannot hold the factor from one scale to the other.
    """

    def __init__(
        self, name: str, layer: AccumulatingModule, scale: Tensor | None, bits: int = ACCUMULATOR_BITS
    ):
        output = layer.fixed_output
        require_levels(name, output)
        self._scale, self._scale_bits = output.scale, layer.settings.scale_bits
        if scale is not None:
            self._factor = self.factor_of(scale)
            require_finite(name, self._factor)
        self._bits = bits
        self._zero_point = zero_point_of(output, slice(None))
        # All of this rises with the sum, so that a ReLU before it is a bound on what comes out.
        self._low = max(output.q_min, -self._zero_point) if layer.fused_relu else output.q_min
        self._high = output.q_max

    def factor_of(self, scale: Tensor) -> Tensor:
        """From the scale of sums to that of the output."""
        return approximate_scale(self._scale / scale, self._scale_bits)

    def __call__(self, sums: Tensor, scale: Tensor | None = None) -> Tensor:
        """Whole numbers in float32 of sums in int32 or float32; float32 is overwritten.

        ``scale`` is that of every row's sums, (N, 1), where they have their own.
        """
        if self._bits < ACCUMULATOR_BITS:
            sums = saturate(sums, self._bits)
        q = sums.float().mul_(self._factor if scale is None else self.factor_of(scale))
        if self._zero_point:
            q.sub_(self._zero_point)
        return q.round_().clamp_(self._low, self._high)


class RequantizedReLU:
    """A ReLU that is a layer of its own, from the integers of its input to those of its output, likewise."""

    def __init__(self, name: str, relu: FakeQuantized):
        self._inputs, self._output = relu.fixed_input(0), relu.fixed_output
        require_levels(name, self._inputs)
        require_levels(name, self._output)

    def __call__(self, q: Tensor) -> Tensor:
        """Whole numbers in float32 of such."""
        return quantize(dequantize(q, self._inputs).relu_(), self._output)


class Rescaler:
    """From an input's integers to those of the concatenation that it goes into, likewise.

    Args:
        name: Of the layer.
        concat: The layer.
        inputs: Parameters of the input, those of a table's rows all together.
    """

    def __init__(self, name: str, concat: QuantizedConcat, inputs: QuantParams):
        output = concat.fixed_output
        require_levels(name, inputs)
        require_levels(name, output)
        require_finite(name, output.scale / inputs.scale)
        self._inputs = inputs
        self._scale, self._zero_point = output.scale, output.zero_point.item()
        self._low, self._high = output.q_min, output.q_max

    def __call__(self, q: Tensor, params: QuantParams | None = None) -> Tensor:
        """Whole numbers in float32 of such, which are overwritten; ``params`` are rows' own, where they have some."""
        params = params or self._inputs
        q.add_(params.zero_point).mul_(self._scale / params.scale).round_()
        if self._zero_point:
            q.sub_(self._zero_point)
        return q.clamp_(self._low, self._high)


def rescalers_of(
    name: str, concat: QuantizedConcat | ScaledConcat, inputs: Sequence[QuantParams]
) -> list[Rescaler] | None:
    """What brings a concatenation's inputs to the scale they have in common, None where each keeps its own."""
    return [Rescaler(name, concat, x) for x in inputs] if isinstance(concat, QuantizedConcat) else None


class IntegerLinear:
    """A prepared model's linear layer in integers, over one input or over a concatenation of several.

    Args:
        name: Of the layer.
        linear: The layer, with fixed ranges.
        widths: Input features of each of the inputs.
        rescalers: Of each of the inputs, where what puts them side by side brings them to a scale in common.
        relu: What reads the layer's output, and its name, where the layer does not apply it itself.
        wide: It is not computed for every pair, so that weights may have more than 8 bits too.

    Raises:
        NotIntegerError: weights of more than 8 bits, sums that 32 bits may not hold, or ranges or factors between
            scales that float32 does not.
    """

    def __init__(
        self,
        name: str,
        linear: QuantizedLinear,
        widths: Sequence[int],
        rescalers: Sequence[Rescaler] | None = None,
        relu: tuple[str, FakeQuantized] | None = None,
        wide: bool = False,
    ):
        (low, high), inputs = linear.weight_range, linear.fixed_input(0)
        if high - low >= 1 << BITS and not wide:
            raise NotIntegerError(f"layer {name} has weights of more than {BITS} bits")
        require_levels(name, inputs)
        levels = levels_of(inputs)
        wide = wide and max(high - low + 1, levels) > DIGIT
        largest_bias = 0 if linear.bias is None else linear.bias.abs().max().item()
        largest = linear.largest_sum if wide else sum(widths) * largest_terms(levels) + largest_bias
        if not largest < LARGEST_SUM:
            raise NotIntegerError(f"layer {name} has sums that 32 bits may not hold")
        self._rescalers = rescalers
        exact = linear.exact_dtype is torch.float32
        if wide:
            product = WideProduct
        elif exact and len(linear.weight) == 1:
            product = SingleOutput
        else:
            product = partial(IntegerProduct, dtype=torch.float32 if exact else torch.int32)
        ends = pairwise(accumulate(widths, initial=0))
        self._products = [product(linear, slice(start, stop), start == 0) for start, stop in ends]
        self._requantizer = Requantizer(name, linear, linear.accumulator_scale, linear.accumulator_bits)
        self._relu = RequantizedReLU(*relu) if relu else None

    def sums_of(self, position: int, q: Tensor, params: QuantParams | None = None) -> Tensor:
        """What one input, (N, K) whole numbers in float32, adds to the sums: (N, M) in float32 or int32, always alike.

        ``q`` is overwritten; ``params`` are its rows' where they have their own.
        """
        if self._rescalers:
            q = self._rescalers[position](q, params)
        return self._products[position](q)

    def output(self, sums: Tensor) -> Tensor:
        """The layer's integers, or its ReLU's, of its sums, (N, M) in int32 or float32; float32 is overwritten."""
        q = self._requantizer(sums)
        return self._relu(q) if self._relu else q

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The layer's integers, (N, M) whole numbers in float32, of its inputs' (N, K) each; they are overwritten."""
        sums = self.sums_of(0, inputs[0])
        for position, q in enumerate(inputs[1:], 1):
            sums += self.sums_of(position, q)
        return self.output(sums)
