"""ONNX graphs of float and quantized models, with integers between QuantizeLinear and DequantizeLinear.

ONNX defines q = saturate(round(x / s) + z) and x = (q - z) s. In terms of ``distiller.quantization.linear``, its s is
1 / scale and its z is -zero_point. The graph has a quantized tensor in two forms: as real values x, and in units of its
scale, which are the whole numbers q - z. In the end, nodes that the output does not depend on are left out.

Shapes: N pairs, K input features or columns, M output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatchmethod

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from distiller.graph import ModuleCall
from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.quantization.linear import QuantParams, approximate_scale, integer_range, quantize
from distiller.quantization.wrappers import (
    FakeQuantized,
    QuantizedAdd,
    QuantizedConcat,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    QuantizedMult,
    RowQuantizedEmbedding,
    ScaledConcat,
    WeightQuantizedLinear,
    WeightSettings,
    by_row,
)
from distiller.system.cli import InputError

# The first opset with 16-bit integers; ONNX Runtime reads it since 1.18 (May 2024), which reads up to IR version 10.
OPSET, IR_VERSION = 21, 10
SHIFT = 128  # between signed and unsigned integers of 8 bits
MAX_BYTES = (1 << 31) - (1 << 20)  # bytes of weights: the limit of a protocol buffer, less room for nodes
# The operators of modules without weights or attributes.
SIMPLE = {
    nn.ReLU: "Relu",
    nn.Sigmoid: "Sigmoid",
    EltwiseAdd: "Add",
    EltwiseMult: "Mul",
    nn.Identity: "Identity",
}


@dataclass(frozen=True)
class Value:
    """A module's output in the graph.

    Attributes:
        real: The name of its tensor of real values, float32.
        units: The name of its tensor in units of its scale, q - z in float32; None if ``params`` is None.
        params: The (1,) parameters that it was quantized with, or (K,) for each column; None if it was not quantized,
            or if every row has parameters of its own.
    """

    real: str
    units: str | None = None
    params: QuantParams | None = None


def onnx_model(
    graph: Mapping[str, ModuleCall],
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, str],
    output: str,
    weights: Mapping[str, WeightSettings | None] | None = None,
) -> onnx.ModelProto:
    """Build the ONNX model of a model's graph, for any number of rows.

    Args:
        graph: The calls of the leaf modules by name, in order.
        modules: The modules by the same names, in float or as ``PostTrainLinearQuantizer`` has prepared them.
        inputs: For each embedding by name, the name of the (N,) int64 input that it reads.
        output: The name of the graph's output, the (N, 1) float32 output of the last module.
        weights: For each layer by name, how its weights are quantized; required for prepared modules.

    Raises:
        InputError: ONNX cannot express a layer, which the message names, or the model is larger than an ONNX file may
            be.
    """
    builder = GraphBuilder(weights or {})
    values: dict[str, Value] = {}
    for name, call in graph.items():
        read = [Value(inputs[name])] if name in inputs else [values[source] for source in call.inputs]
        values[name] = builder.add(modules[name], name, read)
    builder.node("Identity", [values[name].real], output)
    nodes = _read_nodes(builder.nodes, output)
    read_names = {name for node in nodes for name in node.input}
    initializers = [tensor for name, tensor in builder.initializers.items() if name in read_names]
    if sum(len(tensor.raw_data) for tensor in initializers) > MAX_BYTES:
        raise InputError("the model is larger than the 2 GB that an ONNX file holds")
    index = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["N"])
        for name in dict.fromkeys(inputs.values())
    ]
    score = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", 1])
    return helper.make_model(
        helper.make_graph(nodes, "NeuMF", index, [score], initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="neumf-int8",
    )


def _read_nodes(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Return the nodes that ``output`` depends on, in their order."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def integer_type(q_min: int, q_max: int) -> np.dtype:
    """Return the smallest integer type that ONNX can quantize to and that holds [q_min, q_max].

    Raises:
        ValueError: no such type holds the range.
    """
    for kind in (np.uint8, np.int8, np.uint16, np.int16):
        if np.iinfo(kind).min <= q_min and q_max <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise ValueError(f"ONNX has no quantized integers from {q_min} to {q_max}")


def unsigned(params: QuantParams) -> QuantParams:
    """Return parameters that give the same values by unsigned integers, if those given are of signed ones of 8 bits.

    An integer q becomes q + ``SHIFT``. On processors without VNNI, ONNX Runtime adds two products of signed 8-bit
    integers in 16 bits, where they saturate; it adds those of unsigned ones in 32.
    """
    if not (-SHIFT <= params.q_min < 0 and params.q_max < SHIFT):
        return params
    return QuantParams(params.scale, params.zero_point - SHIFT, params.q_min + SHIFT, params.q_max + SHIFT)


def flat(x: Tensor) -> np.ndarray:
    """Return a tensor's values in float64: one scalar if they are all equal, else in one dimension."""
    values = x.double().flatten().numpy()
    return values[0] if (values == values[0]).all() else values


class GraphBuilder:
    """A collector of the nodes and initializers of an ONNX graph, to which modules are added one after the other.

    Its methods take ``name``, from which they form the names of what they add, and return names of tensors.

    Args:
        weights: For each layer by name, how its weights are quantized.

    Attributes:
        nodes: The nodes so far, in order.
        initializers: The constants so far, by name.
    """

    def __init__(self, weights: Mapping[str, WeightSettings | None]):
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Add a node of an operator and return the name of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray | float) -> str:
        """Add an initializer and return its name; floating-point values become float32."""
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        self.initializers[name] = numpy_helper.from_array(array.copy(), name)
        return name

    def scale(self, name: str, params: QuantParams) -> list[str]:
        """Add ONNX's scale and zero point of these parameters and return their names; equal values become scalars."""
        params = unsigned(params)
        scale, zero_point = flat(params.scale), flat(-params.zero_point)
        shape = np.broadcast_shapes(scale.shape, zero_point.shape)
        kind = integer_type(params.q_min, params.q_max)
        return [
            self.constant(f"{name}/scale", np.broadcast_to(1 / scale, shape)),
            self.constant(f"{name}/zero_point", np.broadcast_to(zero_point, shape).astype(kind)),
        ]

    def value(self, name: str, integers: str, params: QuantParams) -> Value:
        """Add both forms of a tensor of integers, which has one scale or one for every column."""
        real = self.scale(f"{name}/real", params)
        units = self.scale(f"{name}/units", in_units(params))
        return Value(
            self.node("DequantizeLinear", [integers, *real], f"{name}/real", axis=1),
            self.node("DequantizeLinear", [integers, *units], f"{name}/units", axis=1),
            params,
        )

    def quantize(self, name: str, x: str, params: QuantParams) -> str:
        """Add the quantization of a real tensor; it saturates at the range of ``params``, also below the type's."""
        params = unsigned(params)
        limits = np.iinfo(integer_type(params.q_min, params.q_max))
        if (limits.min, limits.max) != (params.q_min, params.q_max):
            low, high = ((end + params.zero_point) / params.scale for end in (params.q_min, params.q_max))
            bounds = [
                self.constant(f"{name}/{end}", flat(bound)) for end, bound in (("low", low), ("high", high))
            ]
            x = self.node("Clip", [x, *bounds], f"{name}/clipped")
        return self.node("QuantizeLinear", [x, *self.scale(f"{name}/quantized", params)], f"{name}/q", axis=1)

    def read(self, name: str, module: QuantizedModule, inputs: Sequence[Value]) -> list[Value]:
        """Return a module's inputs quantized with its own parameters, unless they carry the same already.

        Raises:
            InputError: the module finds its ranges on every forward (dynamic quantization).
        """
        if module.dynamic:
            raise InputError(f"layer {name} finds its ranges on every batch; ONNX holds static ones here")
        seen = []
        for position, x in enumerate(inputs):
            params = module.fixed_input(position)
            if params is not None and not same(params, x.params):
                at = f"{name}/input_{position}"
                x = self.value(at, self.quantize(at, x.real, params), params)
            seen.append(x)
        return seen

    def output(self, name: str, module: QuantizedModule, x: str, as_units: bool = False) -> Value:
        """Add ReLU, if the module has it, and the quantization of its output, and return the output.

        Args:
            name: The module's name.
            module: The module.
            x: The name of the tensor to quantize.
            as_units: Whether ``x`` is in units of the output's scale, not in real values.
        """
        if module.fused_relu:
            x = self.node("Relu", [x], f"{name}/relu")
        params = module.fixed_output
        return self.value(name, self.quantize(name, x, in_units(params) if as_units else params), params)

    def weight(self, name: str, q: Tensor, params: QuantParams, scale: np.ndarray) -> str:
        """Add a Linear's (M, K) integers, dequantized with ONNX's ``scale``: one value, or (M,) for the rows."""
        q = q.to(torch.int64) + (unsigned(params).q_min - params.q_min)
        params = unsigned(params)
        kind = integer_type(params.q_min, params.q_max)
        zero_point = flat(-params.zero_point)
        shape = np.broadcast_shapes(scale.shape, zero_point.shape)
        names = [
            self.constant(f"{name}.weight", q.numpy().astype(kind)),
            self.constant(f"{name}.weight/scale", np.broadcast_to(scale, shape)),
            self.constant(f"{name}.weight/zero_point", np.broadcast_to(zero_point, shape).astype(kind)),
        ]
        return self.node("DequantizeLinear", names, f"{name}.weight/real", axis=0)

    def linear(self, name: str, x: str, weight: str, bias: str | None) -> str:
        """Add the (N, M) product x W^T + b; without a bias, x W^T."""
        return self.node("Gemm", [x, weight, *([bias] if bias else [])], f"{name}/sum", transB=1)

    def in_float(self, name: str, module: nn.Module, inputs: Sequence[Value]) -> str:
        """Add a float module and return the name of its output.

        Raises:
            InputError: the module is of no type that a NeuMF has.
        """
        if isinstance(module, nn.Linear):
            return self.float_linear(name, module, inputs[0])
        tensors = [x.real for x in inputs]
        if isinstance(module, nn.Embedding):
            table = self.constant(f"{name}.weight", module.weight.detach().numpy())
            return self.node("Gather", [table, *tensors], f"{name}/float")
        if isinstance(module, Concat):
            return self.node("Concat", tensors, f"{name}/float", axis=module.dim)
        if type(module) not in SIMPLE:
            raise InputError(f"layer {name} is a {type(module).__name__}, which is not known here")
        return self.node(SIMPLE[type(module)], tensors, f"{name}/float")

    def float_linear(self, name: str, module: nn.Linear, x: Value) -> str:
        """Add a Linear with float weights, x W^T + b: (N, M)."""
        weight = self.constant(f"{name}.weight", module.weight.detach().numpy())
        has_bias = module.bias is not None
        bias = self.constant(f"{name}.bias", module.bias.detach().numpy()) if has_bias else None
        total = self.linear(name, x.real, weight, bias)
        if x.params is None:
            return total
        # The Max changes no value. Without it, onnxruntime quantizes the float weight, as that of a Gemm with quantized
        # input and output.
        lowest = self.constant(f"{name}/lowest", np.finfo(np.float32).min)
        return self.node("Max", [total, lowest], f"{name}/float")

    @singledispatchmethod
    def add(self, module: nn.Module, name: str, inputs: Sequence[Value]) -> Value:
        """Add a module that reads ``inputs``, and return its output; by default as a float module.

        Raises:
            InputError: ONNX cannot express the layer, which the message names.
        """
        if isinstance(module, nn.Identity):
            return inputs[0]
        return Value(self.in_float(name, module, inputs))

    @add.register
    def _(self, module: FakeQuantized, name: str, inputs: Sequence[Value]) -> Value:
        """Add a float module between quantized inputs and a quantized output."""
        if not isinstance(module.module, nn.Embedding):
            inputs = self.read(name, module, inputs)
        return self.output(name, module, self.in_float(name, module.module, inputs))

    @add.register
    def _(self, module: QuantizedEmbedding, name: str, inputs: Sequence[Value]) -> Value:
        """Add an embedding table of integers; rows are gathered before they are dequantized."""
        params = module.params
        stored = unsigned(params)
        table = module.weight.numpy().astype(np.int64) + (stored.q_min - params.q_min)
        table = table.astype(integer_type(stored.q_min, stored.q_max))
        rows = [self.constant(f"{name}.weight", table), inputs[0].real]
        return self.value(name, self.node("Gather", rows, f"{name}/q"), params)

    @add.register
    def _(self, module: RowQuantizedEmbedding, name: str, inputs: Sequence[Value]) -> Value:
        """Add an embedding table with a scale and a zero point for every row, which are gathered as the rows are."""
        params, index = module.params, inputs[0].real
        packed = module.bits < 8
        low = params.q_min if packed else 0  # packed integers start at 0
        kind = np.dtype(np.uint8) if packed else integer_type(params.q_min, params.q_max)
        tables = {
            "weight": module.weight.numpy().astype(kind),
            "scale": 1 / params.scale.double().flatten().numpy(),
            "zero_point": (-params.zero_point.flatten() - low).numpy().astype(kind),
        }
        rows, scale, zero_point = (
            self.node("Gather", [self.constant(f"{name}.{what}", table), index], f"{name}/{what}")
            for what, table in tables.items()
        )
        if packed:
            rows = self.unpack(name, rows, module.width)
        return Value(self.node("DequantizeLinear", [rows, scale, zero_point], f"{name}/real", axis=0))

    def unpack(self, name: str, rows: str, width: int) -> str:
        """Add the unpacking of (N, (width + 1) // 2) bytes of two 4-bit integers, lower half first, to (N, width)."""
        mask, four = self.constant(f"{name}/15", np.uint8(15)), self.constant(f"{name}/4", np.uint8(4))
        last = self.constant(f"{name}/last", np.array([-1]))
        halves = [
            self.node("BitwiseAnd", [rows, mask], f"{name}/lower"),
            self.node("BitShift", [rows, four], f"{name}/upper", direction="RIGHT"),
        ]
        columns = [self.node("Unsqueeze", [half, last], f"{half}/column") for half in halves]
        pairs = self.node("Concat", columns, f"{name}/pairs", axis=2)
        flat_pairs = self.node("Flatten", [pairs], f"{name}/unpacked", axis=1)
        if width % 2 == 0:
            return flat_pairs
        ends = [self.constant(f"{name}/slice_{x}", np.array([x])) for x in (0, width, 1)]
        return self.node("Slice", [flat_pairs, *ends], f"{name}/sliced")

    @add.register
    def _(self, module: QuantizedLinear, name: str, inputs: Sequence[Value]) -> Value:
        """Add a Linear in integers.

        The factor that requantizes the sums to the output's integers goes into the scale of the weight.
        """
        (x,) = self.read(name, module, inputs)
        if module.largest_sum >= 1 << (module.accumulator_bits - 1):
            raise InputError(
                f"layer {name} has sums that may saturate at {module.accumulator_bits} bits, which ONNX does not do"
            )
        params, output = module.all_params()["weight"], module.fixed_output
        factor = approximate_scale(
            output.scale / module.accumulator_scale, module.settings.scale_bits
        ).double()
        as_units = module.has_output_scales
        bias_scale = factor if as_units else factor / output.scale
        weight_scale = bias_scale if module.folded else bias_scale * module.fixed_input(0).scale
        weight = self.weight(name, module.weight, params, flat(weight_scale))
        bias = None if module.bias is None else self.bias(name, module.bias, flat(bias_scale))
        total = self.linear(name, x.units if module.folded else x.real, weight, bias)
        return self.output(name, module, total, as_units)

    def bias(self, name: str, bias: Tensor, scale: np.ndarray) -> str:
        """Add a (M,) bias, integers in units of the accumulator, dequantized with ONNX's ``scale``."""
        names = [
            self.constant(f"{name}.bias", bias.numpy().astype(np.int32)),
            self.constant(f"{name}.bias/scale", scale),
        ]
        return self.node("DequantizeLinear", names, f"{name}.bias/real", axis=0)

    @add.register
    def _(self, module: WeightQuantizedLinear, name: str, inputs: Sequence[Value]) -> Value:
        """Add a Linear with a quantized weight and float activations."""
        settings = self.weights[name]
        bounds = integer_range(settings.bits, settings.mode)
        params = QuantParams(module.w_scale, module.w_zero_point, *bounds)
        weight = self.weight(name, quantize(module.weight, by_row(params)), params, 1 / flat(params.scale))
        bias = None if module.bias is None else self.constant(f"{name}.bias", module.bias.numpy())
        return Value(self.linear(name, inputs[0].real, weight, bias))

    @add.register
    def _(self, module: QuantizedMult, name: str, inputs: Sequence[Value]) -> Value:
        """Add an element-wise product of quantized tensors."""
        seen = self.read(name, module, inputs)
        product = self.node("Mul", [x.real for x in seen], f"{name}/product")
        if module.settings.scale_bits is not None:
            product = self.approximate(name, product, module, seen)
        return self.output(name, module, product)

    def approximate(self, name: str, product: str, module: QuantizedMult, seen: Sequence[Value]) -> str:
        """Add the multiplication of a product by the relative error of a ``scale_bits`` bit requantization factor.

        Raises:
            InputError: every row has a factor of its own.
        """
        if any(x.params is None for x in seen):
            raise InputError(
                f"layer {name} has factors between scales that are cut to a few bits, row by row"
            )
        exact = module.fixed_output.scale / (seen[0].params.scale * seen[1].params.scale)
        share = approximate_scale(exact, module.settings.scale_bits).double() / exact.double()
        return self.node("Mul", [product, self.constant(f"{name}/cut", flat(share))], f"{name}/approximate")

    @add.register
    def _(self, module: QuantizedConcat, name: str, inputs: Sequence[Value]) -> Value:
        """Add a concatenation that requantizes all inputs to one scale."""
        seen = [x.real for x in self.read(name, module, inputs)]
        return self.output(name, module, self.node("Concat", seen, f"{name}/float", axis=module.dim))

    @add.register
    def _(self, module: ScaledConcat, name: str, inputs: Sequence[Value]) -> Value:
        """Add a concatenation whose columns keep the scales of their inputs."""
        seen = self.read(name, module, inputs)
        return Value(
            self.node("Concat", [x.real for x in seen], f"{name}/real", axis=1),
            self.node("Concat", [x.units for x in seen], f"{name}/units", axis=1),
            module.fixed_output,
        )

    @add.register
    def _(self, module: QuantizedAdd, name: str, inputs: Sequence[Value]) -> Value:
        """Add a sum of quantized tensors, each of which is first rounded to units of the output's scale."""
        terms = []
        for position, x in enumerate(self.read(name, module, inputs)):
            factor = self.constant(
                f"{name}/factor_{position}", flat(module.fixed_output.scale / x.params.scale)
            )
            scaled = self.node("Mul", [x.units, factor], f"{name}/scaled_{position}")
            terms.append(self.node("Round", [scaled], f"{name}/rounded_{position}"))
        return self.output(name, module, self.node("Add", terms, f"{name}/sum"), as_units=True)


def same(one: QuantParams, other: QuantParams | None) -> bool:
    """Return whether two tensors' parameters map the same values to the same integers."""
    return (
        other is not None
        and (one.q_min, one.q_max) == (other.q_min, other.q_max)
        and torch.equal(one.scale, other.scale)
        and torch.equal(one.zero_point, other.zero_point)
    )


def in_units(params: QuantParams) -> QuantParams:
    """Return the parameters with a scale of 1, under which an integer q stands for the whole number q - z."""
    return replace(params, scale=torch.ones_like(params.scale))
