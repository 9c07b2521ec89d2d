"""Statistics of activations, by hooks on every leaf module.

Shapes: a forward sees B batches of R rows each, C values a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from distiller.graph import leaf_modules
from distiller.quantization.histogram import Histogram
from distiller.quantization.statistics import Statistics, save_statistics, text_of_columns

STATS_FILE = "acts_quantization_stats.yaml"
HISTOGRAM_BINS = 2048  # a quarter of one of 256 quantization levels is then still resolved

TestFunction = Callable[..., object]


@dataclass
class _TensorRecord:
    """Running statistics of one input or output over all forwards. Sums are Python floats, float64."""

    shape: str
    min: float = float("inf")
    max: float = float("-inf")
    rows: int = 0
    count: int = 0
    sum: float = 0.0
    row_min_sum: float = 0.0
    row_max_sum: float = 0.0
    square_sum: float = 0.0
    deviation_sum: float = 0.0
    column_max: Tensor | None = None
    counts: Tensor | None = None  # of float values, over [min, max]

    @property
    def mean(self) -> float:
        return self.sum / self.count

    def add_range(self, batches: Tensor) -> None:
        """Take in (B, R, C) values: ranges and sums."""
        low, high = torch.aminmax(batches.flatten(0, 1), dim=1)  # by row
        if batches.shape[2] == 1:
            # One value is no range of a row: its batch's range stands for it.
            low, high = batches.amin((1, 2)), batches.amax((1, 2))
        weight = batches.shape[0] * batches.shape[1] / len(low)
        self.min = min(self.min, float(low.min()))
        self.max = max(self.max, float(high.max()))
        column_max = batches.amax((0, 1)).float().cpu()
        self.column_max = (
            column_max if self.column_max is None else torch.maximum(self.column_max, column_max)
        )
        self.rows += batches.shape[0] * batches.shape[1]
        self.count += batches.numel()
        self.sum += batches.sum(dtype=torch.float64).item()
        self.row_min_sum += weight * low.sum(dtype=torch.float64).item()
        self.row_max_sum += weight * high.sum(dtype=torch.float64).item()

    def add_deviation(self, batches: Tensor) -> None:
        """Take in (B, R, C) values again: deviations from the final mean."""
        deviation = batches.double().sub_(self.mean).abs_()
        self.deviation_sum += deviation.sum().item()
        self.square_sum += deviation.square_().sum().item()

    def add_counts(self, batches: Tensor) -> None:
        """Take in (B, R, C) values again: how often each part of the final range occurs."""
        counts = torch.tensor([float(batches.numel())], dtype=torch.float64)
        if self.min < self.max:
            counts = torch.histc(batches.float(), HISTOGRAM_BINS, self.min, self.max).double().cpu()
        self.counts = counts if self.counts is None else self.counts + counts

    def summary(self) -> dict:
        of_floats = {}
        if self.counts is not None:
            of_floats["column_max"] = text_of_columns(self.column_max)
            of_floats["histogram"] = Histogram(self.min, self.max, self.counts).plain()
        return {
            "min": self.min,
            "max": self.max,
            "avg_min": self.row_min_sum / self.rows,
            "avg_max": self.row_max_sum / self.rows,
            "mean": self.mean,
            "std": (self.square_sum / self.count) ** 0.5,
            "b": self.deviation_sum / self.count,
            "shape": self.shape,
        } | of_floats


@dataclass
class _ModuleRecord:
    inputs: dict[int, _TensorRecord] = field(default_factory=dict)
    output: _TensorRecord | None = None


def collect_quant_stats(
    model: nn.Module,
    test_fn: TestFunction,
    save_dir: str | os.PathLike | None = None,
    rows_per_batch: int | None = None,
) -> Statistics:
    """Collect what post-training quantization needs to know of activations.

    Of every input and output of every leaf module that ``test_fn`` makes ``model`` call: min, max; mean, std
    (population) and b (mean absolute deviation) over all elements; avg_min and avg_max, the mean over rows of a
    row's min and max. A tensor of one value per row uses its batch's min and max in place of the row's. Of floating
    point values, also every column's max and a histogram of ``HISTOGRAM_BINS`` over [min, max].

    Args:
        model: In float; put into evaluation mode.
        test_fn: Called as ``test_fn(model=model)``, twice, without gradients. Both calls must be alike.
        save_dir: Where to write the statistics, as ``STATS_FILE``.
        rows_per_batch: R, where a forward holds several batches; by default a forward is one batch.

    Returns:
        By module, in the order of ``named_modules``: ``inputs`` by position, and ``output``.

    Raises:
        ValueError: a forward's rows are no multiple of ``rows_per_batch``, or no module was called.
    """
    records: dict[str, _ModuleRecord] = {}

    def first_pass(name: str, position: int | None, batches: Tensor, shape: str) -> None:
        record = records.setdefault(name, _ModuleRecord())
        if position is None:
            record.output = record.output or _TensorRecord(shape)
            record.output.add_range(batches)
        else:
            record.inputs.setdefault(position, _TensorRecord(shape)).add_range(batches)

    def second_pass(name: str, position: int | None, batches: Tensor, shape: str) -> None:
        record = records[name]
        tensor = record.output if position is None else record.inputs[position]
        tensor.add_deviation(batches)
        if batches.is_floating_point():
            tensor.add_counts(batches)

    for visit in (first_pass, second_pass):
        with _visited(model, visit, rows_per_batch):
            test_fn(model=model)
    if not records:
        raise ValueError("test_fn called no module of the model")
    statistics = {
        name: {
            "inputs": {i: tensor.summary() for i, tensor in sorted(records[name].inputs.items())},
            "output": records[name].output.summary(),
        }
        for name in leaf_modules(model)
        if name in records
    }
    if save_dir is not None:
        save_statistics(statistics, Path(save_dir) / STATS_FILE)
    return statistics


Visit = Callable[[str, int | None, Tensor, str], None]


@contextmanager
def _visited(model: nn.Module, visit: Visit, rows_per_batch: int | None) -> Iterator[None]:
    """While it lasts, ``visit(name, position, (B, R, C) values, shape)`` of leaf modules' tensors.

    ``position`` is the input's, None for the output.
    """

    def tensors(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            for position, x in [*enumerate(inputs), (None, output)]:
                visit(name, position, *_batches(x.detach(), rows_per_batch))

        return hook

    model.eval()
    handles = [module.register_forward_hook(tensors(name)) for name, module in leaf_modules(model).items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(x: Tensor, rows_per_batch: int | None) -> tuple[Tensor, str]:
    """(B, R, C) values, and the text of one batch's shape."""
    rows = rows_per_batch or len(x)
    if len(x) % rows:
        raise ValueError(f"a forward of {len(x)} rows does not divide into batches of {rows}")
    shape = ", ".join(map(str, (rows, *x.shape[1:])))
    return x.reshape(len(x) // rows, rows, -1), f"({shape})"
