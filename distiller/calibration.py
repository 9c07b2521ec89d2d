"""Calibration: statistics of a model's activations, collected by hooks on every leaf module.

Shapes: a forward sees B batches of R rows each, with C values in a row.
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

CALIBRATED_STATS_FILE = "acts_quantization_stats.yaml"
HISTOGRAM_BINS = 2048  # enough to resolve a quarter of one of 256 quantization levels

TestFunction = Callable[..., object]


@dataclass
class _TensorRecord:
    """The running statistics of a module's input or output over all forwards; the sums are in float64."""

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
    counts: Tensor | None = None  # a histogram over [min, max], of floating-point values only

    @property
    def mean(self) -> float:
        """The mean over all elements so far."""
        return self.sum / self.count

    def add_range(self, batches: Tensor) -> None:
        """Add (B, R, C) values to the ranges and the sums, in the first pass."""
        low, high = torch.aminmax(batches.flatten(0, 1), dim=1)  # by row
        if batches.shape[2] == 1:
            # A single value has no range; the range of its batch takes the place of its row's.
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
        """Add the deviations of (B, R, C) values from the final mean, in the second pass."""
        deviation = batches.double().sub_(self.mean).abs_()
        self.deviation_sum += deviation.sum().item()
        self.square_sum += deviation.square_().sum().item()

    def add_counts(self, batches: Tensor) -> None:
        """Count (B, R, C) values in the histogram over the final range, in the second pass."""
        counts = torch.tensor([float(batches.numel())], dtype=torch.float64)
        if self.min < self.max:
            counts = torch.histc(batches.float(), HISTOGRAM_BINS, self.min, self.max).double().cpu()
        self.counts = counts if self.counts is None else self.counts + counts

    def summary(self) -> dict:
        """Return the statistics by name, as ``collect_quant_stats`` lists them."""
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
    """The running statistics of a leaf module: of its inputs by position, and of its output."""

    inputs: dict[int, _TensorRecord] = field(default_factory=dict)
    output: _TensorRecord | None = None


def collect_quant_stats(
    model: nn.Module,
    test_fn: TestFunction,
    save_dir: str | os.PathLike | None = None,
    rows_per_batch: int | None = None,
) -> Statistics:
    """Collect the statistics of activations that post-training quantization needs.

    Every input and output of every leaf module that ``test_fn`` makes ``model`` call gets: min and max; mean, std
    (population) and b (mean absolute deviation) over all elements; avg_min and avg_max, the means over rows of the
    row's min and max, or of its batch's where rows hold one value each. Floating-point tensors also get the max of
    every column and a histogram of ``HISTOGRAM_BINS`` bins over [min, max].

    Args:
        model: The float model; it is put into evaluation mode.
        test_fn: Called twice as ``test_fn(model=model)``, without gradients. Both calls must do the same.
        save_dir: The directory to write the statistics to, as ``CALIBRATED_STATS_FILE``; None to write none.
        rows_per_batch: R, if a forward holds several batches; by default a forward is one batch.

    Returns:
        The statistics by module, in the order of ``named_modules``: ``inputs`` by position, and ``output``.

    Raises:
        ValueError: a forward's rows are no multiple of ``rows_per_batch``, or ``test_fn`` calls no module.
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
        save_statistics(statistics, Path(save_dir) / CALIBRATED_STATS_FILE)
    return statistics


Visit = Callable[[str, int | None, Tensor, str], None]


@contextmanager
def _visited(model: nn.Module, visit: Visit, rows_per_batch: int | None) -> Iterator[None]:
    """Call ``visit`` for every input and output of the leaf modules that run within the context.

    Its arguments are the module's name, the input's position (None for the output), the (B, R, C) values, and the text
    of one batch's shape.
    """

    def hook_of(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            for position, x in [*enumerate(inputs), (None, output)]:
                visit(name, position, *_batches(x.detach(), rows_per_batch))

        return hook

    model.eval()
    handles = [module.register_forward_hook(hook_of(name)) for name, module in leaf_modules(model).items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(x: Tensor, rows_per_batch: int | None) -> tuple[Tensor, str]:
    """Return a tensor as (B, R, C) values, and the text of one batch's shape."""
    rows = rows_per_batch or len(x)
    if len(x) % rows:
        raise ValueError(f"a forward of {len(x)} rows does not divide into batches of {rows}")
    shape = ", ".join(map(str, (rows, *x.shape[1:])))
    return x.reshape(len(x) // rows, rows, -1), f"({shape})"
