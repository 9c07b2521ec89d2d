"""What the quantized forms of all modules have in common: quantize inputs, accumulate in integers, requantize.

A quantized module takes and returns float tensors. It simulates integer arithmetic: its integers are whole numbers held
in floats, without error. The dequantized output carries the ``QuantParams`` that it was quantized with, so that the
module that reads it recovers the same integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.linear import (
    LinearQuantMode,
    QuantParams,
    approximate_scale,
    dequantize,
    integer_range,
    quantize,
)
from distiller.quantization.settings import ActivationSettings


def carry(x: Tensor, params: QuantParams) -> Tensor:
    """Return ``x``, which from here on carries the parameters it was quantized with."""
    x.quant_params = params
    return x


def carried(x: Tensor) -> QuantParams | None:
    """Return the parameters that a tensor carries; None for a float tensor, which carries none."""
    return getattr(x, "quant_params", None)


def saturate(integers: Tensor, bits: int) -> Tensor:
    """Return integers clamped to the range of a signed accumulator of ``bits`` bits."""
    return integers.clamp(*integer_range(bits, LinearQuantMode.SYMMETRIC))


class QuantizedModule(nn.Module, ABC):
    """A module that quantizes its inputs and returns an output quantized with parameters of its own.

    Args:
        settings: The settings of this layer's activations.
        inputs: The parameters of each input, which its producer carries or which come from statistics. None for an
            input that carries other ones on every forward: its rows have parameters of their own. With dynamic
            quantization, None in place of the sequence: parameters are found on every forward, carried by the input or
            else measured.
        output: The parameters of the output. None for dynamic quantization: they are measured on every forward.
        fused_relu: Whether the module applies a ReLU before it quantizes its output.
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
        """Return all fixed parameters, by the name of the tensor: ``output``, ``input_0``, ..."""
        return {name: self._registered(name) for name in self._ranges}

    def input_params(self, position: int, x: Tensor) -> QuantParams:
        """Return the parameters to quantize the input ``x`` at ``position`` with."""
        return self.fixed_input(position) or carried(x) or self.settings.params_of_tensor(x)

    def fixed_input(self, position: int) -> QuantParams | None:
        """Return the parameters of the input at ``position``; None where they are found on every forward."""
        name = f"input_{position}"
        return self._registered(name) if name in self._ranges else None

    @property
    def fixed_output(self) -> QuantParams | None:
        """The parameters that every output carries; None where they are found on every forward."""
        return None if self.dynamic else self._registered("output")

    def output_params(self, x: Tensor, scale: Tensor | float = 1.0) -> QuantParams:
        """Return the parameters to quantize the output with; the output in floats is ``x / scale``."""
        if self.dynamic:
            return self.settings.params_of_tensor(x / scale, half_range=self.fused_relu)
        return self._registered("output")

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output in floats, which carries its parameters."""


@dataclass(frozen=True)
class Operand:
    """A quantized input.

    Attributes:
        q: Its integers, whole numbers in float32.
        params: The parameters of these integers.
    """

    q: Tensor
    params: QuantParams

    @property
    def integers(self) -> Tensor:
        """The input in units of its scale: q + zero_point."""
        return self.q + self.params.zero_point

    @property
    def scale(self) -> Tensor:
        """The scale of the input, in quanta per unit."""
        return self.params.scale


class AccumulatingModule(QuantizedModule):
    """An operation on integers, whose result, the accumulator, has a scale of its own and is then requantized."""

    @abstractmethod
    def accumulate(self, *operands: Operand) -> tuple[Tensor, Tensor]:
        """Return the accumulator, whole numbers in float32, and its scale in quanta per unit."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the requantized result in floats, which carries its parameters."""
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
