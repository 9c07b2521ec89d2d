"""Quantized forms of modules. They simulate integer arithmetic: integers held in floats, without error.

Each takes float tensors, quantizes them, accumulates, and returns the dequantized output, which carries its
``QuantParams``, so that a wrapper that reads it recovers the same integers.

Shapes: N rows, K input features, M output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.clipping import ClipMode, clip_range, column_reach, measure
from distiller.quantization.linear import (
    LinearQuantMode,
    QuantParams,
    approximate_scale,
    dequantize,
    fake_quantize,
    integer_range,
    params_of_range,
    quantize,
    storage_dtype,
)

# Float32 adds integers without error, in any order, while no partial sum reaches this.
EXACT_IN_FLOAT32 = 1 << 24
BIAS_BITS = 32  # of a bias that is not yet in its accumulator's units
ACCUMULATOR_BITS = 32  # of every accumulator but Linear's, which has a setting


@dataclass(frozen=True)
class ActivationSettings:
    """How one layer's activations are quantized.

    Attributes:
        bits: 1 or more.
        mode: Of quantization.
        clip: Which part of the range is kept.
        n_stds: For ``ClipMode.N_STD``.
        scale_bits: Multiplier bits that scales are cut to; None for no such limit.
    """

    bits: int
    mode: LinearQuantMode
    clip: ClipMode = ClipMode.NONE
    n_stds: float | None = None
    scale_bits: int | None = None

    def params(
        self, statistics: dict, half_range: bool = False, column_max: Tensor | None = None
    ) -> QuantParams:
        """Scale and zero point from a tensor's statistics: (1,), or, of a ReLU's output, (C,) by columns' maxima (C,).

        Zero points come from the scale before its cut.
        """
        low, high = clip_range(statistics, self.clip, self.mode, self.bits, self.n_stds, half_range)
        if column_max is not None:
            high = column_reach(column_max, high)
            low = torch.zeros_like(high)
        exact = params_of_range(low, high, self.bits, self.mode)
        scale = approximate_scale(exact.scale, self.scale_bits)
        return QuantParams(scale, exact.zero_point, exact.q_min, exact.q_max)

    def params_of_tensor(self, x: Tensor, half_range: bool = False) -> QuantParams:
        """Scale and zero point from the tensor at hand."""
        return self.params(measure(x, self.clip, self.mode.symmetric), half_range)


def carry(x: Tensor, params: QuantParams) -> Tensor:
    """``x``, which from here on carries the parameters it was quantized with."""
    x.quant_params = params
    return x


def carried(x: Tensor) -> QuantParams | None:
    """The parameters that a tensor was quantized with, None for a float tensor."""
    return getattr(x, "quant_params", None)


class QuantizedModule(nn.Module, ABC):
    """Quantizes its inputs, accumulates in integers, and requantizes to its output's parameters.

    Args:
        settings: Of this layer's activations.
        inputs: Parameters of each input, which its producer carries or which come from statistics. None for an input
            that carries other ones on every forward: rows with parameters of their own. None for all of them: found on
            every forward, carried or else measured (dynamic quantization).
        output: Parameters of the output; None likewise.
        fused_relu: Apply ReLU to the accumulator.
    """

    def __init__(
        self,
        settings: ActivationSettings,
        inputs: Sequence[QuantParams | None] | None,
        output: QuantParams | None,
        fused_relu: bool = False,
    ):
        super().__init__()
        self.settings = settings
        self.fused_relu = fused_relu
        self._ranges: dict[str, tuple[int, int]] = {}
        self.dynamic = output is None
        if output is not None:
            self._register("output", output)
            for position, params in enumerate(inputs):
                if params is not None:
                    self._register(f"input_{position}", params)

    def _register(self, name: str, params: QuantParams) -> None:
        """Keep parameters as buffers, so that they move between devices and into checkpoints."""
        self.register_buffer(f"{name}_scale", params.scale)
        self.register_buffer(f"{name}_zero_point", params.zero_point)
        self._ranges[name] = (params.q_min, params.q_max)

    def _registered(self, name: str) -> QuantParams:
        return QuantParams(
            getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero_point"), *self._ranges[name]
        )

    def all_params(self) -> dict[str, QuantParams]:
        """All parameters that are fixed, by what they are of."""
        return {name: self._registered(name) for name in self._ranges}

    def input_params(self, position: int, x: Tensor) -> QuantParams:
        """The parameters to quantize input ``position`` with."""
        return self.fixed_input(position) or carried(x) or self.settings.params_of_tensor(x)

    def fixed_input(self, position: int) -> QuantParams | None:
        """The parameters of input ``position``; None where they are found on every forward."""
        name = f"input_{position}"
        return self._registered(name) if name in self._ranges else None

    @property
    def fixed_output(self) -> QuantParams | None:
        """The parameters that every output carries; None where they are found on every forward."""
        return None if self.dynamic else self._registered("output")

    def output_params(self, x: Tensor, scale: Tensor | float = 1.0) -> QuantParams:
        """The parameters to quantize the output with, which in floats is ``x / scale``."""
        if self.dynamic:
            return self.settings.params_of_tensor(x / scale, half_range=self.fused_relu)
        return self._registered("output")

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor: ...


class FakeQuantized(QuantizedModule):
    """Any module, run in floats between quantized inputs and a quantized output."""

    def __init__(self, module: nn.Module, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        # Indices are no activations. Quantizing again what already is quantized changes nothing.
        seen = [
            fake_quantize(x, self.input_params(position, x)) if x.is_floating_point() else x
            for position, x in enumerate(inputs)
        ]
        x = self.module(*seen)
        if self.fused_relu:
            x = F.relu(x)
        params = self.output_params(x)
        return carry(fake_quantize(x, params), params)


@dataclass(frozen=True)
class Operand:
    """A quantized input: its integers, whole numbers in float32, and their parameters."""

    q: Tensor
    params: QuantParams

    @property
    def integers(self) -> Tensor:
        """The input in units of its scale: q + zero_point."""
        return self.q + self.params.zero_point

    @property
    def scale(self) -> Tensor:
        return self.params.scale


class AccumulatingModule(QuantizedModule):
    """An operation on integers: an accumulator with a scale of its own, then requantized."""

    @abstractmethod
    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """The accumulator, whole numbers in float32, and its scale in quanta per unit."""

    def forward(self, *inputs: Tensor) -> Tensor:
        operands = []
        for position, x in enumerate(inputs):
            params = self.input_params(position, x)
            operands.append(Operand(quantize(x, params), params))
        accumulator, scale = self.accumulate(*operands)
        if self.fused_relu:
            accumulator = F.relu(accumulator)
        output = self.output_params(accumulator, scale)
        requantize = approximate_scale(output.scale / scale, self.settings.scale_bits)
        q = quantize(accumulator, QuantParams(requantize, output.zero_point, output.q_min, output.q_max))
        return carry(dequantize(q, output), output)


class QuantizedMult(AccumulatingModule):
    """``EltwiseMult``: the integers' product is in units of the scales' product."""

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        integers, scale = operands[0].integers, operands[0].scale
        for operand in operands[1:]:
            integers, scale = integers * operand.integers, scale * operand.scale
        return saturate(integers, ACCUMULATOR_BITS), scale


class RescalingModule(AccumulatingModule):
    """Brings every input to the output's scale, where they add up or stand beside each other."""

    def rescale(self, operand: Operand) -> Tensor:
        rescaled = torch.round(operand.integers * (self.output_scale / operand.scale))
        return saturate(rescaled, ACCUMULATOR_BITS)


class QuantizedConcat(RescalingModule):
    """``Concat`` along ``dim``."""

    def __init__(self, dim: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dim = dim

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        return torch.cat([self.rescale(x) for x in operands], dim=self.dim), self.output_scale


class ScaledConcat(QuantizedModule):
    """``Concat`` along dimension 1 whose inputs keep scales of their own: its output has a scale for every column.

    A ``QuantizedLinear`` that reads it folds these scales into its weight.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        seen = [fake_quantize(x, self.fixed_input(position)) for position, x in enumerate(inputs)]
        return carry(torch.cat(seen, dim=1), self.fixed_output)


def params_of_columns(params: Sequence[QuantParams], widths: Sequence[int]) -> QuantParams:
    """Parameters of tensors side by side, ``widths`` columns each: (K,)."""
    return QuantParams(
        torch.cat([x.scale.expand(width) for x, width in zip(params, widths, strict=True)]),
        torch.cat([x.zero_point.expand(width) for x, width in zip(params, widths, strict=True)]),
        min(x.q_min for x in params),
        max(x.q_max for x in params),
    )


class QuantizedAdd(RescalingModule):
    """``EltwiseAdd``."""

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        total = self.rescale(operands[0])
        for operand in operands[1:]:
            total = total + self.rescale(operand)
        return total, self.output_scale


def saturate(integers: Tensor, bits: int) -> Tensor:
    """Integers within a signed accumulator of ``bits`` bits."""
    return integers.clamp(*integer_range(bits, LinearQuantMode.SYMMETRIC))


@dataclass(frozen=True)
class WeightSettings:
    """How one layer's weights are quantized.

    Attributes:
        bits: 1 or more.
        mode: Of quantization.
        per_channel: One scale per output feature of a Linear.
        accumulator_bits: Of a Linear's accumulator.
    """

    bits: int
    mode: LinearQuantMode
    per_channel: bool = False
    accumulator_bits: int = ACCUMULATOR_BITS

    def params(self, weight: Tensor) -> QuantParams:
        """Parameters over the whole range of a Linear's (M, K) weight: (M,) per channel, else (1,)."""
        rows = weight.detach() if self.per_channel else weight.detach().reshape(1, -1)
        return params_of_range(rows.amin(1), rows.amax(1), self.bits, self.mode)


def by_row(params: QuantParams) -> QuantParams:
    """(M,) parameters as (M, 1), for a weight's rows."""
    return QuantParams(params.scale[:, None], params.zero_point[:, None], params.q_min, params.q_max)


def bias_params(bias: Tensor) -> QuantParams:
    """Parameters of a bias on its own: symmetric over the whole tensor, (1,)."""
    reach = bias.detach().abs().max().reshape(1)
    return params_of_range(-reach, reach, BIAS_BITS, LinearQuantMode.SYMMETRIC)


def quantize_weights(module: nn.Module, weight: Tensor, params: QuantParams) -> None:
    """Give ``module`` the integers of a weight and their parameters as buffers: weight, w_scale, w_zero_point."""
    q = quantize(weight.detach(), by_row(params))
    module.register_buffer("weight", q.to(storage_dtype(params.q_min, params.q_max)))
    module.register_buffer("w_scale", params.scale)
    module.register_buffer("w_zero_point", params.zero_point)


class QuantizedLinear(AccumulatingModule):
    """``nn.Linear`` in integers: acc = (q_x + zp_x) . (q_w + zp_w) + bias.

    The bias is held in the accumulator's units; in dynamic quantization these are only known per forward, and
    it is rescaled from integers of its own. Products and sums are exact: in float32 while none can reach
    2^24, in float64 where one can.

    An input with a scale s_k for every column k is read as the whole numbers that it consists of, of scale 1, by the
    weights w_k / s_k: the same products.

    Args:
        linear: The float layer.
        weights: How its weights are quantized.
        args, kwargs: Of ``QuantizedModule``.
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
        """Get ready to multiply by the (M, K) whole numbers q_w + zp_w."""
        operand = self.weight + self.w_zero_point[:, None]
        self.exact_dtype = torch.float64 if self.dynamic else self._exact_dtype(operand)
        self.register_buffer("operand", operand.to(self.exact_dtype), persistent=False)

    def _exact_dtype(self, operand: Tensor) -> torch.dtype:
        """What holds every partial sum of a product, and the bias, without error."""
        x = self.fixed_input(0)
        largest_bias = 0 if self.bias is None else self.bias.abs().max().item()
        self.largest_sum = operand.double().abs().sum(1).max().item() * (x.q_max - x.q_min + 1) + largest_bias
        return torch.float32 if self.largest_sum < EXACT_IN_FLOAT32 else torch.float64

    def all_params(self) -> dict[str, QuantParams]:
        weight = QuantParams(self.w_scale, self.w_zero_point, *self.weight_range)
        return super().all_params() | {"weight": weight}

    @property
    def has_output_scales(self) -> bool:
        """Whether every output feature has a scale of its own."""
        return not self.dynamic and self.fixed_output.scale.numel() > 1

    def _accumulator_scale(self, input_scale: Tensor) -> Tensor:
        scale = self.w_scale if self.folded else input_scale * self.w_scale
        return approximate_scale(scale, self.settings.scale_bits)

    @property
    def accumulator_scale(self) -> Tensor:
        """(M,) or (1,) quanta per unit of the sums, where ranges are fixed."""
        return self._accumulator_scale(self.fixed_input(0).scale)

    def _bias_in(self, units: Tensor) -> Tensor | None:
        """(M,) the bias in units of the accumulator."""
        if self.bias is None or not self.dynamic:
            return self.bias
        rescale = approximate_scale(units / self.bias_scale, self.settings.scale_bits)
        return saturate(torch.round(rescale * self.bias), self.accumulator_bits)

    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        (x,) = operands
        scale = self._accumulator_scale(x.scale)
        total = F.linear(x.integers.to(self.exact_dtype), self.operand)
        bias = self._bias_in(scale)
        if bias is not None:
            total = total + bias
        return saturate(total, self.accumulator_bits).float(), scale


def _prepare_again(linear: QuantizedLinear, _: object) -> None:
    linear._prepare_product()


class QuantizedTable(nn.Module, ABC):
    """``nn.Embedding`` with a table of integers; what it hands out carries its parameters."""

    @property
    @abstractmethod
    def params(self) -> QuantParams:
        """Parameters of the whole table, broadcastable to it."""

    @abstractmethod
    def integers(self) -> Tensor:
        """The table's integers, one by one."""

    @abstractmethod
    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        """Rows, whole numbers in float32, and their parameters."""

    def all_params(self) -> dict[str, QuantParams]:
        """The table's, by its name."""
        return {"weight": self.params}

    def forward(self, index: Tensor) -> Tensor:
        q, params = self.lookup(index)
        return carry(dequantize(q, params), params)


class QuantizedEmbedding(QuantizedTable):
    """A table with one scale.

    Args:
        embedding: The float layer.
        params: (1,) parameters of the table. Values beyond their range saturate.
    """

    def __init__(self, embedding: nn.Embedding, params: QuantParams):
        super().__init__()
        self._range = (params.q_min, params.q_max)
        quantize_weights(self, embedding.weight, params)

    @property
    def params(self) -> QuantParams:
        return QuantParams(self.w_scale, self.w_zero_point, *self._range)

    def integers(self) -> Tensor:
        return self.weight

    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        return F.embedding(index, self.weight).float(), self.params


class RowQuantizedEmbedding(QuantizedTable):
    """A table with a scale and a zero point for every row, over the row's own range; 4 bits are packed two to a byte.

    Args:
        embedding: The float layer.
        bits: 4 or 8.
        mode: Of quantization.
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
        # A zero point is within [-(2^bits - 1), 2^bits - 1].
        self.register_buffer("w_zero_point", params.zero_point.to(torch.int8 if bits == 4 else torch.int16))

    @property
    def params(self) -> QuantParams:
        return QuantParams(self.w_scale, self.w_zero_point.float(), *self._range)

    def integers(self) -> Tensor:
        return self._unpacked(self.weight)

    def _unpacked(self, rows: Tensor) -> Tensor:
        return unpack(rows, self.width) + self._range[0] if self.bits == 4 else rows

    def lookup(self, index: Tensor) -> tuple[Tensor, QuantParams]:
        scale, zero_point = (F.embedding(index, x) for x in (self.w_scale, self.w_zero_point))
        rows = self._unpacked(F.embedding(index, self.weight))
        return rows.float(), QuantParams(scale, zero_point.float(), *self._range)


def pack(q: Tensor) -> Tensor:
    """Rows of whole numbers in [0, 15], (N, K), as bytes of two, the first in the lower half: (N, (K + 1) // 2)."""
    low, high = q[:, ::2].to(torch.uint8), q[:, 1::2].to(torch.uint8)
    return low | (F.pad(high, (0, low.shape[1] - high.shape[1])) << 4)


def unpack(packed: Tensor, width: int) -> Tensor:
    """(N, ``width``) int8 of what ``pack`` made."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :width].to(torch.int8)


class WeightQuantizedLinear(nn.Module):
    """``nn.Linear`` on float activations, its weights and bias rounded to what integers can hold."""

    def __init__(self, linear: nn.Linear, weights: WeightSettings):
        super().__init__()
        params = weights.params(linear.weight)
        self.register_buffer("weight", fake_quantize(linear.weight.detach(), by_row(params)))
        self.register_buffer("w_scale", params.scale)
        self.register_buffer("w_zero_point", params.zero_point)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias if bias is None else fake_quantize(bias, bias_params(bias)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
