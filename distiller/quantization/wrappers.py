"""The quantized forms of modules, one class for each kind of module.

Modules with quantized activations are ``QuantizedModule``; embedding tables and layers of which only the weights are
quantized stand at the end.

Shapes: N rows, K input features or columns, M output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.linear import (
    LinearQuantMode,
    QuantParams,
    approximate_scale,
    dequantize,
    fake_quantize,
    params_of_range,
    quantize,
    storage_dtype,
)
from distiller.quantization.quantized_module import (
    AccumulatingModule,
    Operand,
    QuantizedModule,
    carry,
    saturate,
)
from distiller.quantization.settings import ACCUMULATOR_BITS, WeightSettings
from distiller.quantization.settings import ActivationSettings as ActivationSettings

# Float32 adds integers without error, in any order, while no partial sum reaches this.
EXACT_IN_FLOAT32 = 1 << 24
BIAS_BITS = 32  # of a bias that is quantized with a range of its own


class FakeQuantized(QuantizedModule):
    """Any module, run in floats on quantized and dequantized inputs, with a quantized output.

    Args:
        module: The float module.
        args, kwargs: The arguments of ``QuantizedModule``.
    """

    def __init__(self, module: nn.Module, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the module's quantized output in floats, which carries its parameters."""
        # Integer inputs are indices and no activations. To quantize again what is quantized already changes nothing.
        seen = [
            fake_quantize(x, self.input_params(position, x)) if x.is_floating_point() else x
            for position, x in enumerate(inputs)
        ]
        x = self.module(*seen)
        if self.fused_relu:
            x = F.relu(x)
        params = self.output_params(x)
        return carry(fake_quantize(x, params), params)


class QuantizedMult(AccumulatingModule):
    """The quantized form of ``EltwiseMult``: the scale of the integers' product is the product of their scales."""

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """Return the product of the integers, and its scale."""
        integers, scale = operands[0].integers, operands[0].scale
        for operand in operands[1:]:
            integers, scale = integers * operand.integers, scale * operand.scale
        return saturate(integers, ACCUMULATOR_BITS), scale


class RescalingModule(AccumulatingModule):
    """An operation on inputs of one scale: each input is first brought to the scale of the output."""

    def rescale(self, operand: Operand) -> Tensor:
        """Return the integers of an input, rounded to units of the output's scale."""
        rescaled = torch.round(operand.integers * (self.output_scale / operand.scale))
        return saturate(rescaled, ACCUMULATOR_BITS)


class QuantizedConcat(RescalingModule):
    """The quantized form of ``Concat``.

    Args:
        dim: The dimension along which inputs are concatenated.
        args, kwargs: The arguments of ``QuantizedModule``.
    """

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dim = dim

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """Return the concatenation of the rescaled inputs, and the scale of the output."""
        return torch.cat([self.rescale(x) for x in operands], dim=self.dim), self.output_scale


class ScaledConcat(QuantizedModule):
    """A ``Concat`` along dimension 1 whose inputs keep scales of their own: its output has a scale for every column.

    The ``QuantizedLinear`` that reads the output folds these scales into its weight.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the concatenation of the quantized inputs in floats, which carries its columns' parameters."""
        seen = [fake_quantize(x, self.fixed_input(position)) for position, x in enumerate(inputs)]
        return carry(torch.cat(seen, dim=1), self.fixed_output)


def params_of_columns(params: Sequence[QuantParams], widths: Sequence[int]) -> QuantParams:
    """Return the parameters of a concatenation, (K,) with one scale per column.

    Args:
        params: The parameters of each tensor that is concatenated: (1,), or one for each of its columns.
        widths: The number of columns of each tensor.
    """
    return QuantParams(
        torch.cat([x.scale.expand(width) for x, width in zip(params, widths, strict=True)]),
        torch.cat([x.zero_point.expand(width) for x, width in zip(params, widths, strict=True)]),
        min(x.q_min for x in params),
        max(x.q_max for x in params),
    )


class QuantizedAdd(RescalingModule):
    """The quantized form of ``EltwiseAdd``."""

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """Return the sum of the rescaled inputs, and the scale of the output."""
        total = self.rescale(operands[0])
        for operand in operands[1:]:
            total = total + self.rescale(operand)
        return total, self.output_scale


def by_row(params: QuantParams) -> QuantParams:
    """Return (M,) parameters in the shape (M, 1), which broadcasts to the rows of a weight."""
    return QuantParams(params.scale[:, None], params.zero_point[:, None], params.q_min, params.q_max)


def bias_params(bias: Tensor) -> QuantParams:
    """Return the (1,) parameters of a bias that is quantized on its own: symmetric over the whole tensor."""
    reach = bias.detach().abs().max().reshape(1)
    return params_of_range(-reach, reach, BIAS_BITS, LinearQuantMode.SYMMETRIC)


def quantize_weights(module: nn.Module, weight: Tensor, params: QuantParams) -> None:
    """Register the integers of a weight and their parameters as buffers: weight, w_scale and w_zero_point."""
    q = quantize(weight.detach(), by_row(params))
    module.register_buffer("weight", q.to(storage_dtype(params.q_min, params.q_max)))
    module.register_buffer("w_scale", params.scale)
    module.register_buffer("w_zero_point", params.zero_point)


class QuantizedLinear(AccumulatingModule):
    """The quantized form of ``nn.Linear``: acc = (q_x + zp_x) . (q_w + zp_w) + bias.

    The bias is held in the accumulator's units. With dynamic quantization these are only known on each forward: there
    the bias is held with a scale of its own and rescaled each time. Products and sums are exact: they are computed in
    float32 if none can reach 2^24, else in float64.

    An input may have a scale s_k for every column k. Then it is read as the whole numbers q_x + zp_x, with scale 1, and
    the weights w_k are replaced by w_k / s_k, which gives the same products. The scales are folded into the weight.

    Args:
        linear: The float layer.
        weights: How its weights are quantized.
        args, kwargs: The arguments of ``QuantizedModule``.

    Attributes:
        folded: Whether the scales of the input's columns are folded into the weight.
        weight_range: The least and the greatest integer of the weight.
        exact_dtype: The type that sums are computed in, float32 or float64.
        largest_sum: What no partial sum exceeds in magnitude; only where ranges are fixed.
    """

    def __init__(self, linear: nn.Linear, weights: WeightSettings, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accumulator_bits = weights.accumulator_bits
        inputs = self.fixed_input(0)
        self.folded = inputs is not None and inputs.scale.numel() > 1
        weight = linear.weight.detach() / inputs.scale if self.folded else linear.weight
        params = weights.params(weight)
        self.weight_range = (params.q_min, params.q_max)
        quantize_weights(self, weight, params)
        self._quantize_bias(linear.bias)
        self._prepare_product()
        self.register_load_state_dict_post_hook(_prepare_again)

    def _quantize_bias(self, bias: Tensor | None) -> None:
        """Register the bias: in units of the accumulator or, with dynamic quantization, with a scale of its own."""
        self.bias: Tensor | None
        if bias is None:
            self.register_buffer("bias", None)
        elif self.dynamic:
            params = bias_params(bias)
            self.register_buffer("bias", quantize(bias.detach(), params))
            self.register_buffer("bias_scale", params.scale)
        else:
            bias = torch.round(self.accumulator_scale * bias.detach())
            self.register_buffer("bias", saturate(bias, self.accumulator_bits))

    def _prepare_product(self) -> None:
        """Register the (M, K) whole numbers q_w + zp_w, in the type that products with them are computed in."""
        operand = self.weight + self.w_zero_point[:, None]
        self.exact_dtype = torch.float64 if self.dynamic else self._exact_dtype(operand)
        self.register_buffer("operand", operand.to(self.exact_dtype), persistent=False)

    def _exact_dtype(self, operand: Tensor) -> torch.dtype:
        """Return the type that holds every partial sum of a product and the bias without error."""
        x = self.fixed_input(0)
        largest_bias = 0 if self.bias is None else self.bias.abs().max().item()
        self.largest_sum = operand.double().abs().sum(1).max().item() * (x.q_max - x.q_min + 1) + largest_bias
        return torch.float32 if self.largest_sum < EXACT_IN_FLOAT32 else torch.float64

    def all_params(self) -> dict[str, QuantParams]:
        """Return all fixed parameters, by the name of the tensor, with those of the weight as ``weight``."""
        weight = QuantParams(self.w_scale, self.w_zero_point, *self.weight_range)
        return super().all_params() | {"weight": weight}

    @property
    def has_output_scales(self) -> bool:
        """Whether every feature of the output has a scale of its own."""
        return not self.dynamic and self.fixed_output.scale.numel() > 1

    def _accumulator_scale(self, input_scale: Tensor) -> Tensor:
        scale = self.w_scale if self.folded else input_scale * self.w_scale
        return approximate_scale(scale, self.settings.scale_bits)

    @property
    def accumulator_scale(self) -> Tensor:
        """The scale of the accumulator in quanta per unit, (M,) or (1,); only where ranges are fixed."""
        return self._accumulator_scale(self.fixed_input(0).scale)

    def _bias_in(self, units: Tensor) -> Tensor | None:
        """Return the bias in ``units``, the scale of the accumulator, (M,); None where there is none."""
        if self.bias is None or not self.dynamic:
            return self.bias
        rescale = approximate_scale(units / self.bias_scale, self.settings.scale_bits)
        return saturate(torch.round(rescale * self.bias), self.accumulator_bits)

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """Return the sums, (N, M), and their scale."""
        (x,) = operands
        scale = self._accumulator_scale(x.scale)
        total = F.linear(x.integers.to(self.exact_dtype), self.operand)
        bias = self._bias_in(scale)
        if bias is not None:
            total = total + bias
        return saturate(total, self.accumulator_bits).float(), scale


def _prepare_again(linear: QuantizedLinear, _: object) -> None:
    """Derive from a loaded weight what is not in the checkpoint."""
    linear._prepare_product()


class QuantizedTable(nn.Module, ABC):
    """The quantized form of ``nn.Embedding``: a table of integers. The rows that it returns carry their parameters."""

    @property
    @abstractmethod
    def params(self) -> QuantParams:
        """The parameters of the whole table, broadcastable to it."""

    @abstractmethod
    def integers(self) -> Tensor:
        """Return the integers of the whole table, one to an element."""

    @abstractmethod
    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        """Return the rows at ``index``, whole numbers in float32, and their parameters."""

    def all_params(self) -> dict[str, QuantParams]:
        """Return the parameters of the table under the name ``weight``."""
        return {"weight": self.params}

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows at ``index`` in floats, which carry their parameters."""
        q, params = self.lookup(index)
        return carry(dequantize(q, params), params)


class QuantizedEmbedding(QuantizedTable):
    """An embedding table with one scale and one zero point.

    Args:
        embedding: The float layer.
        params: The (1,) parameters of the table. Values beyond their range saturate.
    """

    def __init__(self, embedding: nn.Embedding, params: QuantParams):
        super().__init__()
        self._range = (params.q_min, params.q_max)
        quantize_weights(self, embedding.weight, params)

    @property
    def params(self) -> QuantParams:
        """The (1,) parameters of the table."""
        return QuantParams(self.w_scale, self.w_zero_point, *self._range)

    def integers(self) -> Tensor:
        """Return the integers of the whole table."""
        return self.weight

    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        """Return the rows at ``index``, whole numbers in float32, and the parameters of the table."""
        return F.embedding(index, self.weight).float(), self.params


class RowQuantizedEmbedding(QuantizedTable):
    """An embedding table with a scale and a zero point for every row, by the row's own range.

    Integers of 4 bits are packed two to a byte.

    Args:
        embedding: The float layer.
        bits: The width of the integers, 4 or 8.
        mode: How a range is mapped to integers.
    """

    def __init__(self, embedding: nn.Embedding, bits: int, mode: LinearQuantMode):
        super().__init__()
        table = embedding.weight.detach()
        params = by_row(params_of_range(table.amin(1), table.amax(1), bits, mode))
        self.bits, self.width = bits, table.shape[1]
        self._range = (params.q_min, params.q_max)
        q = quantize(table, params)
        packed = pack(q - params.q_min) if bits == 4 else q.to(storage_dtype(*self._range))
        self.register_buffer("weight", packed)
        self.register_buffer("w_scale", params.scale)
        # A zero point lies within [-(2^bits - 1), 2^bits - 1].
        self.register_buffer("w_zero_point", params.zero_point.to(torch.int8 if bits == 4 else torch.int16))

    @property
    def params(self) -> QuantParams:
        """The parameters of the table, one for every row, in a shape that broadcasts to it."""
        return QuantParams(self.w_scale, self.w_zero_point.float(), *self._range)

    def integers(self) -> Tensor:
        """Return the integers of the whole table, unpacked."""
        return self._unpacked(self.weight)

    def _unpacked(self, rows: Tensor) -> Tensor:
        """Return the integers of rows of the table, one to an element."""
        return unpack(rows, self.width) + self._range[0] if self.bits == 4 else rows

    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        """Return the rows at ``index``, whole numbers in float32, and the parameters of each row."""
        scale, zero_point = (F.embedding(index, x) for x in (self.w_scale, self.w_zero_point))
        rows = self._unpacked(F.embedding(index, self.weight))
        return rows.float(), QuantParams(scale, zero_point.float(), *self._range)


def pack(q: Tensor) -> Tensor:
    """Return rows of whole numbers packed two to a byte, the first of two in the byte's lower half.

    Args:
        q: (N, K) whole numbers in [0, 15].

    Returns:
        (N, (K + 1) // 2) uint8.
    """
    low, high = q[:, ::2].to(torch.uint8), q[:, 1::2].to(torch.uint8)
    return low | (F.pad(high, (0, low.shape[1] - high.shape[1])) << 4)


def unpack(packed: Tensor, width: int) -> Tensor:
    """Return the (N, ``width``) int8 whole numbers that ``pack`` has packed."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :width].to(torch.int8)


class WeightQuantizedLinear(nn.Module):
    """An ``nn.Linear`` on float activations whose weight and bias are quantized and dequantized."""

    def __init__(self, linear: nn.Linear, weights: WeightSettings):
        super().__init__()
        params = weights.params(linear.weight)
        self.register_buffer("weight", fake_quantize(linear.weight.detach(), by_row(params)))
        self.register_buffer("w_scale", params.scale)
        self.register_buffer("w_zero_point", params.zero_point)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias if bias is None else fake_quantize(bias, bias_params(bias)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in floats."""
        return F.linear(x, self.weight, self.bias)
