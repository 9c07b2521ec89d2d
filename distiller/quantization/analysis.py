"""Where quantization loses accuracy: every tensor of the quantized layers beside the float model's.

Both models see the same batches, and no more than one batch's tensors are held. An activation's error is therefore
cumulative: it has in it what the layers before have lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.calibration import TestFunction
from distiller.quantization.linear import QuantParams, dequantize, fake_quantize, quantize
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.wrappers import (
    QuantizedModule,
    QuantizedTable,
    WeightQuantizedLinear,
    WeightSettings,
    by_row,
    carried,
)

# Half a level, and what float32 makes of it: at 16 bits, where that is most, scales are off by 0.008 of a level.
ROUNDING = 0.51


@dataclass(frozen=True)
class TensorErrors:
    """One tensor of a quantized layer, and what quantization made of it.

    Of several scales and zero points, per channel, row or column, ``range_min`` and ``range_max`` are the outermost.
    What a scale is needed for is None where none is fixed.

    Attributes:
        layer: The layer's name.
        type: Its quantized form.
        tensor: ``input 0``, ``input 1``, ``output`` or ``weight``.
        min: Least value of the float model's tensor; after the ReLU, where that is fused.
        max: Greatest likewise.
        mean: Mean likewise.
        std: Population standard deviation likewise.
        sqnr: 10 log10(sum x^2 / sum (x_q - x)^2) dB of the float model's x and the quantized model's x_q, both sums
            over all values; inf where they are equal.
        range_min: What the least integer stands for.
        range_max: What the greatest integer stands for.
        scale: Quanta per unit, the mean of several.
        zero_point: Of one scale; None where there are several.
        levels_used: Share of the integers of its range that the quantized model's tensor has.
        saturated: Share of the float model's values further than half a level outside the range.
    """

    layer: str
    type: str
    tensor: str
    min: float
    max: float
    mean: float
    std: float
    sqnr: float
    range_min: float | None = None
    range_max: float | None = None
    scale: float | None = None
    zero_point: int | None = None
    levels_used: float | None = None
    saturated: float | None = None


def compare_tensors(
    model: nn.Module,
    quantizer: PostTrainLinearQuantizer,
    test_fn: TestFunction,
    rows_per_batch: int | None = None,
) -> list[TensorErrors]:
    """Compare a quantized model with the float model that it was, tensor by tensor.

    Args:
        model: In float, on the quantized model's device; put into evaluation mode.
        quantizer: Prepared, of a copy of ``model``.
        test_fn: Called as ``test_fn(model=model)``, once, without gradients; calls the model on tensors by position
            and anything else by name.
        rows_per_batch: Rows that both models are called on at a time, for a model whose arithmetic depends on the
            whole batch; by default as many as ``test_fn`` gives.

    Returns:
        By quantized layer in the order of the graph: its floating point inputs, its output, its weight.

    Raises:
        ValueError: test_fn did not call the model.
    """
    records: dict[str, dict[str, _Record]] = {name: {} for name in quantizer.describe()}
    with torch.no_grad(), _compared(model, quantizer, records):
        test_fn(model=_SideBySide(model, quantizer.model, rows_per_batch).eval())
    for name, of_layer in records.items():
        if not of_layer:
            raise ValueError(f"test_fn did not make the model call {name}")
        module, weight = quantizer.modules[name], getattr(model.get_submodule(name), "weight", None)
        if hasattr(module, "w_scale"):
            seen, params = _quantized_weight(module, weight.detach(), quantizer.weights[name])
            of_layer.setdefault("weight", _Record()).add(weight.detach(), seen, params)
    return [
        TensorErrors(name, type(quantizer.modules[name]).__name__, tensor, **record.summary())
        for name, of_layer in records.items()
        for tensor, record in of_layer.items()
    ]


class _SideBySide(nn.Module):
    """Calls the float model and then the quantized one, whose result it gives, on a few rows at a time."""

    def __init__(self, model: nn.Module, quantized: nn.Module, rows: int | None):
        super().__init__()
        self.model, self.quantized, self.rows = model, quantized, rows

    def forward(self, *inputs: Tensor, **settings: Any) -> Tensor:
        rows = self.rows or len(inputs[0])
        results = []
        for part in zip(*(x.split(rows) for x in inputs), strict=True):
            self.model(*part, **settings)
            results.append(self.quantized(*part, **settings))
        return torch.cat(results)


@contextmanager
def _compared(
    model: nn.Module, quantizer: PostTrainLinearQuantizer, records: dict[str, dict[str, _Record]]
) -> Iterator[None]:
    """While it lasts, calls of both models, the float one first, add to the records."""
    before: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before[name] = (*inputs, F.relu(output) if name in quantizer.fused else output)

        return hook

    def compare(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            names = [*(f"input {position}" for position in range(len(inputs))), "output"]
            pairs = zip(before.pop(name), _quantized_tensors(module, inputs, output), strict=True)
            for tensor, (x, (seen, params)) in zip(names, pairs, strict=True):
                if x.is_floating_point():
                    records[name].setdefault(tensor, _Record()).add(x, seen, params)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in records]
    handles += [quantizer.modules[name].register_forward_hook(compare(name)) for name in records]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantized_tensors(
    module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Iterator[tuple[Tensor, QuantParams | None]]:
    """What a quantized module computes with, then its output, each with its parameters where they are fixed."""
    dynamic = getattr(module, "dynamic", False)
    for position, x in enumerate(inputs):
        if isinstance(module, QuantizedModule) and x.is_floating_point():
            params = module.input_params(position, x)
            yield fake_quantize(x, params), None if dynamic else params
        else:
            yield x, None
    yield output, None if dynamic else carried(output)


def _quantized_weight(
    module: nn.Module, weight: Tensor, settings: WeightSettings
) -> tuple[Tensor, QuantParams]:
    """A weight as its integers stand for it, and parameters that broadcast to it."""
    if isinstance(module, QuantizedTable):
        return dequantize(module.integers(), module.params), module.params
    if isinstance(module, WeightQuantizedLinear):
        return module.weight, by_row(settings.params(weight))
    params = by_row(module.all_params()["weight"])
    if module.folded:  # it holds the weight over its input's scales
        scale = params.scale / module.fixed_input(0).scale
        params = QuantParams(scale, params.zero_point, params.q_min, params.q_max)
    return dequantize(module.weight, params), params


class _Record:
    """Running sums over all batches of a tensor, in float64."""

    def __init__(self):
        self.min, self.max = math.inf, -math.inf
        self.count, self.sum, self.square_sum, self.error_sum = 0, 0.0, 0.0, 0.0
        self.range_min, self.range_max = math.inf, -math.inf
        self.scales, self.scale_sum = 0, 0.0
        self.zero_point: int | None = None
        self.saturated = 0
        self.used: Tensor | None = None  # (q_max - q_min + 1,) bool, by integer

    def add(self, x: Tensor, seen: Tensor, params: QuantParams | None) -> None:
        """Take in the float model's tensor and the quantized one's, with its parameters where they are fixed."""
        self.min, self.max = min(self.min, x.min().item()), max(self.max, x.max().item())
        self.count += x.numel()
        self.sum += x.sum(dtype=torch.float64).item()
        self.square_sum += x.double().square_().sum().item()
        self.error_sum += (seen.double() - x).square_().sum().item()
        if params is not None:
            self._add_params(params)
            self._add_integers(x, seen, params)

    def _add_params(self, params: QuantParams) -> None:
        ends = torch.tensor([params.q_min, params.q_max], device=params.scale.device)
        low, high = ((end + params.zero_point) / params.scale for end in ends)
        self.range_min, self.range_max = (
            min(self.range_min, low.min().item()),
            max(self.range_max, high.max().item()),
        )
        self.scales += params.scale.numel()
        self.scale_sum += params.scale.sum(dtype=torch.float64).item()
        self.zero_point = int(params.zero_point) if params.scale.numel() == 1 else None

    def _add_integers(self, x: Tensor, seen: Tensor, params: QuantParams) -> None:
        levels = params.q_max - params.q_min + 1
        integers = (quantize(seen, params) - params.q_min).long().flatten()
        used = torch.bincount(integers, minlength=levels) > 0
        self.used = used if self.used is None else self.used | used
        exact = params.scale * x - params.zero_point
        beyond = (exact - exact.clamp(params.q_min, params.q_max)).abs_() > ROUNDING
        self.saturated += int(beyond.sum())

    def summary(self) -> dict[str, float | None]:
        """All fields of ``TensorErrors`` that are numbers."""
        mean = self.sum / self.count
        result: dict[str, float | None] = {
            "min": self.min,
            "max": self.max,
            "mean": mean,
            "std": max(self.square_sum / self.count - mean**2, 0.0) ** 0.5,
            "sqnr": _decibels(self.square_sum, self.error_sum),
        }
        if self.used is not None:
            result |= {
                "range_min": self.range_min,
                "range_max": self.range_max,
                "scale": self.scale_sum / self.scales,
                "zero_point": self.zero_point,
                "levels_used": self.used.double().mean().item(),
                "saturated": self.saturated / self.count,
            }
        return result


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
