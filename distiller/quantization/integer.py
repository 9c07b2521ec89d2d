"""The linear layers of a prepared model on 8-bit integers with 32-bit sums.

Results are equal to those of the modules in ``wrappers``, which simulate integer arithmetic in floats and hold their
integers q as whole numbers in float32. Here, products are computed on codes, which are int8: a code is q - s, with a
shift s that moves unsigned integers into the range of int8. An input of 9 to 16 bits becomes two codes h and l with
q - s = 256 h + l, and two products.

Shapes: N rows, K input features, M output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller.quantization.linear import QuantParams, approximate_scale, dequantize, quantize
from distiller.quantization.quantized_module import AccumulatingModule, saturate
from distiller.quantization.settings import ACCUMULATOR_BITS
from distiller.quantization.wrappers import (
    EXACT_IN_FLOAT32,
    FakeQuantized,
    QuantizedConcat,
    QuantizedLinear,
    ScaledConcat,
)
from distiller.system.cpu import cpu_has

BITS = 8  # of a code
DIGIT = 1 << BITS  # The number of values of a code, and what a unit of the higher of two codes counts.
SCALES_AT_ONCE = 1 << 14  # These need 16 MB for 256 levels of each scale.
# torch._int_mm on CUDA needs more than 16 rows, and multiples of 8 for K and M. AMX works in sixteens: on two cores,
# 4000 x 256 took 0.159 ms by 136 columns, 0.133 by 144 and 0.126 by 128 (2026-11-23).
MIN_ROWS, MULTIPLE = 17, 16
LARGEST_SUM = 1 << 31  # The magnitude that 32-bit sums stay below.
EXACT_FEATURES = EXACT_IN_FLOAT32 >> 14  # Float32 adds up to this many products of two codes without error.


class NotIntegerError(ValueError):
    """The error of a layer that 32-bit sums of products of integers cannot compute; the message says why."""


def require_levels(name: str, params: QuantParams) -> None:
    """Raise a ``NotIntegerError`` unless every integer comes back when it is dequantized and quantized again.

    The modules in ``wrappers`` hand their integers on as floats; here, they are handed on as they are. The two are
    equal where this function does not raise. It raises where float32 does not tell the levels of a range apart.
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
    """Return the number of integers in the range of the parameters."""
    return params.q_max - params.q_min + 1


def code_shift(q_min: int, levels: int) -> int:
    """Return the shift s, which is subtracted from integers to make one code or two codes of each.

    Args:
        q_min: The least integer.
        levels: The number of integers.
    """
    middle = levels // 2 if q_min == 0 else 0
    if levels <= DIGIT:
        return DIGIT // 2 if middle else 0
    return middle + DIGIT // 2  # The lower code starts at -128.


def largest_terms(levels: int) -> int:
    """Return the most that one input feature adds, in magnitude, to the four terms of an ``IntegerProduct``.

    The codes and offsets of a weight are at most 128 in magnitude. Those of an input are at most half its levels, and
    128 more if it is two codes.

    Args:
        levels: The number of integers of the input.
    """
    reach = DIGIT // 2 if levels <= DIGIT else levels // 2 + DIGIT // 2
    return 4 * reach * (DIGIT // 2)


def zero_point_of(params: QuantParams, columns: slice) -> float:
    """Return the zero point that the columns of a slice have in common."""
    return (params.zero_point[columns] if params.zero_point.numel() > 1 else params.zero_point)[0].item()


def product_dtype(features: int, device: torch.device) -> torch.dtype:
    """Return the type that products are computed in: int8 where the hardware supports it, else an exact float type.

    Args:
        features: The number of input features.
        device: Where the products are computed.
    """
    if device.type == "cuda" or cpu_has("avx512_vnni", "avx_vnni", "amx_int8"):
        return torch.int8
    return torch.float32 if features <= EXACT_FEATURES else torch.float64


def code_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Return the exact matrix product of an input's codes and a weight's.

    Args:
        codes: (N, K) int8, the codes of the input. K is a multiple of 16.
        weight: (K, M) codes of the weight in their ``product_dtype``. M is a multiple of 16.

    Returns:
        (N, M) int32.
    """
    if weight.dtype is not torch.int8:
        return (codes.to(weight.dtype) @ weight).to(torch.int32)
    rows = len(codes)
    if rows < MIN_ROWS:
        codes = F.pad(codes, (0, 0, 0, MIN_ROWS - rows))
    return torch._int_mm(codes, weight)[:rows]


class IntegerProduct:
    """The part of a linear layer's sums that some of its input features contribute: (q_x + zp_x) . (q_w + zp_w).

    With x = q_x - s and w = q_w - t, and offsets a = zp_x + s and b = zp_w + t, that is

        (x + a) . (w + b) = x . w + b sum(x) + a sum(w) + K a b.

    The last two terms are constant. w is a code. x is a code too or, with more than 8 bits, 256 h + l of two codes.

    Args:
        linear: The layer.
        columns: The input features.
        bias: Whether to add the layer's bias.
        dtype: The type of the sums: int32, or float32 where it holds all sums of the layer without error.
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
        # The four terms may be larger than their sum is.
        largest = depth * largest_terms(levels) + constant.abs().max().item()
        self._dtype, self._term_dtype = dtype, dtype if largest <= EXACT_IN_FLOAT32 else torch.int32
        self._constant = constant.to(self._term_dtype)
        self._row_offset = b.to(self._term_dtype) if b.any() else None
        self._padding = -depth % MULTIPLE
        weight = F.pad(weight, (0, self._padding, 0, -len(weight) % MULTIPLE))
        self._weight = weight.to(product_dtype(depth, weight.device)).t()

    def __call__(self, q: Tensor) -> Tensor:
        """Return the (N, M) sums of (N, K) whole numbers in float32, which are overwritten."""
        if self._shift:
            q.sub_(self._shift)
        sums = self._product(q).to(self._term_dtype) + self._constant
        if self._row_offset is not None:
            sums.addcmul_(q.sum(1, keepdim=True).to(self._term_dtype), self._row_offset)
        return sums.to(self._dtype)

    def _product(self, x: Tensor) -> Tensor:
        """Return the first term, x . w, (N, M) int32."""
        if self._wide:
            integers = x.to(torch.int32)
            low = self._code_product(integers)  # Of the last bytes, which are the lower codes.
            return low.add_(
                self._code_product(integers.add_(DIGIT // 2).bitwise_right_shift_(BITS)), alpha=DIGIT
            )
        # Compiled, converting float32 to int8 at once takes 0.45 ms, by way of int32 0.39 (4000 x 256, with its sums).
        return self._code_product(x.to(torch.int32) if torch.compiler.is_compiling() else x)

    def _code_product(self, x: Tensor) -> Tensor:
        """Return the product of the weight and the codes that ``x`` becomes as int8."""
        codes = x.to(torch.int8)
        if self._padding:
            codes = F.pad(codes, (0, self._padding))
        return code_product(codes, self._weight)[:, : self._outputs]


class WideProduct:
    """The part of a linear layer's sums that some of its input features contribute, at any number of bits.

    The sums must fit 32 bits. They are computed in float64, which takes long: use it for what is computed once and not
    for every pair of a user and an item.

    Args:
        linear: The layer.
        columns: The input features.
        bias: Whether to add the layer's bias.
    """

    def __init__(self, linear: QuantizedLinear, columns: slice, bias: bool):
        self._zero_point = zero_point_of(linear.fixed_input(0), columns)
        self._weight = linear.operand[:, columns].double()
        self._bias = linear.bias.double() if bias and linear.bias is not None else None

    def __call__(self, q: Tensor) -> Tensor:
        """Return the (N, M) int32 sums of (N, K) whole numbers in float32."""
        return F.linear(q.double() + self._zero_point, self._weight, self._bias).to(torch.int32)


class SingleOutput:
    """The part of a single sum, of a layer with one output, that some of its input features contribute.

    It is exact in float32. The products are added up element by element: a matrix product of one column would be
    computed as one of sixteen.

    Args:
        linear: The layer, whose ``exact_dtype`` is float32.
        columns: The input features.
        bias: Whether to add the layer's bias.
    """

    def __init__(self, linear: QuantizedLinear, columns: slice, bias: bool):
        self._zero_point = zero_point_of(linear.fixed_input(0), columns)
        self._weight = linear.operand[0, columns]
        self._bias = linear.bias if bias else None

    def __call__(self, q: Tensor) -> Tensor:
        """Return the (N, 1) sums in float32 of (N, K) whole numbers in float32, which are overwritten."""
        if self._zero_point:
            q.add_(self._zero_point)
        sums = q.mul_(self._weight).sum(1, keepdim=True)
        return sums if self._bias is None else sums.add_(self._bias)


def require_finite(name: str, factors: Tensor) -> None:
    """Raise a ``NotIntegerError`` unless the factors between a layer's scales are finite."""
    if not torch.isfinite(factors).all():
        raise NotIntegerError(f"layer {name} has a factor between scales that float32 does not hold")


class Requantizer:
    """The step from a layer's sums to the integers of its output.

    It does the same float32 operations in the same order as ``AccumulatingModule``.

    Args:
        name: The layer's name.
        layer: The layer, with fixed ranges.
        scale: The scale of the sums in quanta per unit; None where every row has its own, given on each call.
        bits: The width of the accumulator, at which sums saturate.

    Raises:
        NotIntegerError: float32 does not tell the output's levels apart, or cannot hold the factor between the scales.
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
        # The output never falls when the sum rises, so a ReLU on the sum is a lower bound on the output.
        self._low = max(output.q_min, -self._zero_point) if layer.fused_relu else output.q_min
        self._high = output.q_max

    def factor_of(self, scale: Tensor) -> Tensor:
        """Return the factor from the scale of sums to that of the output."""
        return approximate_scale(self._scale / scale, self._scale_bits)

    def __call__(self, sums: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the integers of the output, whole numbers in float32.

        Args:
            sums: (N, M) int32 or float32; float32 is overwritten.
            scale: (N, 1) scales of the rows' sums, where every row has its own.
        """
        if self._bits < ACCUMULATOR_BITS:
            sums = saturate(sums, self._bits)
        q = sums.float().mul_(self._factor if scale is None else self.factor_of(scale))
        if self._zero_point:
            q.sub_(self._zero_point)
        return q.round_().clamp_(self._low, self._high)


class RequantizedReLU:
    """A ReLU that is a layer of its own: from the integers of its input to those of its output.

    It does the same float32 operations in the same order as ``FakeQuantized``.

    Args:
        name: The layer's name.
        relu: The layer, with fixed ranges.

    Raises:
        NotIntegerError: float32 does not tell the levels of the input or of the output apart.
    """

    def __init__(self, name: str, relu: FakeQuantized):
        self._inputs, self._output = relu.fixed_input(0), relu.fixed_output
        require_levels(name, self._inputs)
        require_levels(name, self._output)

    def __call__(self, q: Tensor) -> Tensor:
        """Return the integers of the output for those of the input; both are whole numbers in float32."""
        return quantize(dequantize(q, self._inputs).relu_(), self._output)


class Rescaler:
    """The step from an input's integers to those of the concatenation that it goes into.

    It does the same float32 operations in the same order as ``QuantizedConcat``.

    Args:
        name: The concatenation's name.
        concat: The concatenation, with fixed ranges.
        inputs: The parameters of the input; for an embedding, those of the whole table.

    Raises:
        NotIntegerError: float32 does not tell the levels of the input or of the output apart, or cannot hold the factor
            between the scales.
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
        """Return the input as integers of the concatenation, whole numbers in float32.

        Args:
            q: (N, K) whole numbers in float32, the integers of the input, which are overwritten.
            params: The parameters of the rows of ``q``, where every row has its own.
        """
        params = params or self._inputs
        q.add_(params.zero_point).mul_(self._scale / params.scale).round_()
        if self._zero_point:
            q.sub_(self._zero_point)
        return q.clamp_(self._low, self._high)


def rescalers_of(
    name: str, concat: QuantizedConcat | ScaledConcat, inputs: Sequence[QuantParams]
) -> list[Rescaler] | None:
    """Return what brings each input of a concatenation to their common scale; None where each keeps its own.

    Args:
        name: The concatenation's name.
        concat: The concatenation, with fixed ranges.
        inputs: The parameters of each input; for an embedding, those of the whole table.
    """
    return [Rescaler(name, concat, x) for x in inputs] if isinstance(concat, QuantizedConcat) else None


class IntegerLinear:
    """A prepared model's linear layer in integers, on one input or on a concatenation of several.

    Args:
        name: The layer's name.
        linear: The layer, with fixed ranges.
        widths: The number of input features of each input.
        rescalers: What brings each input to their common scale; None where each keeps its own.
        relu: The name and the module of a ReLU that reads the layer's output, where the layer does not apply it itself.
        wide: Whether the layer may take long, because it is not computed for every pair of a user and an item. Then its
            weights may have more than 8 bits too.

    Raises:
        NotIntegerError: the layer has weights of more than 8 bits, sums that 32 bits may not hold, or ranges or factors
            between scales that float32 does not hold.
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
        """Return what one input adds to the sums, (N, M): always float32 or always int32 for a layer.

        Args:
            position: The position of the input.
            q: (N, K) whole numbers in float32, the integers of the input, which are overwritten.
            params: The parameters of the rows of ``q``, where every row has its own.
        """
        if self._rescalers:
            q = self._rescalers[position](q, params)
        return self._products[position](q)

    def output(self, sums: Tensor) -> Tensor:
        """Return the integers of the layer's output, after its ReLU: (N, M) whole numbers in float32.

        Args:
            sums: (N, M) int32 or float32, the sum of what ``sums_of`` returns; float32 is overwritten.
        """
        q = self._requantizer(sums)
        return self._relu(q) if self._relu else q

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the integers of the layer's output, (N, M) whole numbers in float32.

        Args:
            inputs: (N, K) whole numbers in float32 each, the integers of the inputs, which are overwritten.
        """
        sums = self.sums_of(0, inputs[0])
        for position, q in enumerate(inputs[1:], 1):
            sums += self.sums_of(position, q)
        return self.output(sums)
