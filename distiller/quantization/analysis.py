"""Where quantization loses accuracy: every tensor of the quantized layers compared with the float model's.

Both models see the same batches, and no more than one batch's tensors are held at a time. The error of an activation is
therefore cumulative: it contains what the layers before have lost.
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
from distiller.quantization.quantized_module import QuantizedModule, carried
from distiller.quantization.settings import WeightSettings
from distiller.quantization.wrappers import QuantizedTable, WeightQuantizedLinear, by_row

# In levels: half of one, and some room for float32's rounding, which is worst at 16 bits, where scales are off by 0.008
# of a level.
ROUNDING = 0.51


@dataclass(frozen=True)
class TensorErrors:
    """The errors of one tensor of a quantized layer, in comparison with the float model's tensor.

    ``min`` to ``std`` are of the float model's tensor, after the ReLU where the layer applies one. ``range_min`` to
    ``saturated`` are None where no range is fixed.

    Attributes:
        layer: The layer's name.
        type: The name of its quantized form's class.
        tensor: ``input 0``, ``input 1``, ``output`` or ``weight``.
        min: The least value.
        max: The greatest value.
        mean: The mean.
        std: The population standard deviation.
        sqnr: The signal-to-quantization-noise ratio 10 log10(sum x^2 / sum (x_q - x)^2) in dB, for the float model's x
            and the quantized model's x_q, with both sums over all values; inf where they are equal.
        range_min: The value that the least integer stands for; the least such value, if there are several scales.
        range_max: The value that the greatest integer stands for; the greatest, if there are several scales.
        scale: The scale in quanta per unit; the mean, if there are several.
        zero_point: The zero point; None if there are several scales.
        levels_used: The share of the integers in the range that occur in the quantized model's tensor.
        saturated: The share of the float model's values that lie more than half a level outside the range.
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
        model: The float model, on the quantized model's device; put into evaluation mode.
        quantizer: The quantizer that has prepared a copy of ``model``.
        test_fn: Called as ``test_fn(model=model)``, once, without gradients. It calls the model on tensors by position
            and on anything else by name.
        rows_per_batch: The number of rows that both models are called on at a time, for a model whose arithmetic
            depends on the whole batch; by default as many as ``test_fn`` gives.

    Returns:
        For every quantized layer in the order of the graph: its floating point inputs, its output and its weight.

    Raises:
        ValueError: ``test_fn`` did not make the model call a quantized layer.
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
    """A pair of models, called on some rows at a time: first the float one, then the quantized one."""

    def __init__(self, model: nn.Module, quantized: nn.Module, rows: int | None):
        super().__init__()
        self.model, self.quantized, self.rows = model, quantized, rows

    def forward(self, *inputs: Tensor, **settings: Any) -> Tensor:
        """Return the quantized model's result for all rows."""
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
    """Let calls of both models, the float one first, add to the records while the context lasts."""
    before: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        """Return a hook that keeps the inputs and the output of a module of the float model."""

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before[name] = (*inputs, F.relu(output) if name in quantizer.fused else output)

        return hook

    def compare(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        """Return a hook that compares the tensors of a quantized module with those that were kept."""

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
    """Yield the inputs as a quantized module computes with them, then its output, each with its fixed parameters."""
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
    """Return the values that a weight's integers stand for, and parameters that broadcast to them."""
    if isinstance(module, QuantizedTable):
        return dequantize(module.integers(), module.params), module.params
    if isinstance(module, WeightQuantizedLinear):
        return module.weight, by_row(settings.params(weight))
    params = by_row(module.all_params()["weight"])
    if module.folded:  # Its weight is divided by its input's scales.
        scale = params.scale / module.fixed_input(0).scale
        params = QuantParams(scale, params.zero_point, params.q_min, params.q_max)
    return dequantize(module.weight, params), params


class _Record:
    """The running sums of one tensor over all batches, in float64."""

    def __init__(self):
        self.min, self.max = math.inf, -math.inf
        self.count, self.sum, self.square_sum, self.error_sum = 0, 0.0, 0.0, 0.0
        self.range_min, self.range_max = math.inf, -math.inf
        self.scales, self.scale_sum = 0, 0.0
        self.zero_point: int | None = None
        self.saturated = 0
        self.used: Tensor | None = None  # (q_max - q_min + 1,) bool, by integer

    def add(self, x: Tensor, seen: Tensor, params: QuantParams | None) -> None:
        """Add a batch's tensor.

        Args:
            x: The float model's tensor.
            seen: The quantized model's tensor.
            params: The parameters of ``seen``; None where they are not fixed.
        """
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
        """Return the fields of ``TensorErrors`` that are numbers, by name."""
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
