"""Histograms of tensors, and the ranges that they speak for.

The mean squared error and the Kullback-Leibler divergence of a range are those of quantizing the histogram's bins with
it. Shapes: B bins, R ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distiller.quantization.linear import LinearQuantMode, QuantParams, dequantize, params_of_range, quantize

PERCENTILE = (
    99.99  # of values kept, the rest cut off in equal shares at both ends: less cut hardly narrows a range
)
STEPS = 128  # a range is searched for in steps of this part of the whole: two of 256 levels
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values fall into equal parts of its range.

    Attributes:
        min: The range's lower end.
        max: Its upper end.
        counts: (B,) float64.
    """

    min: float
    max: float
    counts: Tensor

    @classmethod
    def from_plain(cls, value: object) -> Histogram:
        """From ``plain``'s value.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("counts"), str):
            raise ValueError("not a map of min, max and counts")
        low, high = value.get("min"), value.get("max")
        if not all(type(bound) in (int, float) and abs(bound) < float("inf") for bound in (low, high)):
            raise ValueError("min and max are not both numbers")
        try:
            counts = [int(count) for count in value["counts"].split()]
        except ValueError as error:
            raise ValueError("counts are not whole numbers") from error
        if low > high or not any(counts) or min(counts) < 0 or sum(counts) >= 1 << 63:
            raise ValueError("counts or range of no tensor")
        return cls(low, high, torch.tensor(counts, dtype=torch.float64))

    def plain(self) -> dict[str, Any]:
        """As a map of numbers and a text, for a statistics file."""
        counts = " ".join(str(int(count)) for count in self.counts.tolist())
        return {"min": self.min, "max": self.max, "counts": counts}

    @property
    def edges(self) -> Tensor:
        """(B + 1,) float64, the bounds of the bins; those of a constant are half a unit to both sides."""
        apart = 0.5 * (self.min == self.max)
        return torch.linspace(self.min - apart, self.max + apart, len(self.counts) + 1, dtype=torch.float64)

    @property
    def centers(self) -> Tensor:
        """(B,) float32, the middle of each bin."""
        return ((self.edges[1:] + self.edges[:-1]) / 2).float()

    def within(self, low: float, high: float) -> Histogram:
        """The part of it in [low, high]; all of it where that part is empty."""
        counts = self.counts.where((self.centers >= low) & (self.centers <= high), 0)
        return Histogram(self.min, self.max, counts) if counts.any() else self


def percentile_range(histogram: Histogram) -> tuple[float, float]:
    """The range that keeps ``PERCENTILE`` percent of the values."""
    cut = (1 - PERCENTILE / 100) / 2 * histogram.counts.sum()
    return _bound_above(histogram, cut), _bound_below(histogram, cut)


def _bound_above(histogram: Histogram, count: Tensor) -> float:
    """The value below which ``count`` values lie, which are spread evenly over each bin."""
    reached = histogram.counts.cumsum(0)
    index = int((reached > count).nonzero()[0])
    part = 1 - (reached[index] - count) / histogram.counts[index]
    return histogram.min + (index + part.item()) * (histogram.max - histogram.min) / len(histogram.counts)


def _bound_below(histogram: Histogram, count: Tensor) -> float:
    mirrored = Histogram(-histogram.max, -histogram.min, histogram.counts.flip(0))
    return -_bound_above(mirrored, count)


def least_squares_range(histogram: Histogram, mode: LinearQuantMode, bits: int) -> tuple[float, float]:
    """The range whose quantization has the least mean squared error."""
    return _least_range(histogram, mode, lambda *r: _squared_errors(histogram, _params(*r, bits, mode)))


def least_divergence_range(histogram: Histogram, mode: LinearQuantMode, bits: int) -> tuple[float, float]:
    """The range whose quantization loses least information, by the Kullback-Leibler divergence.

    The values' distribution, cut to the range, is compared with what is left of it when each level's values are spread
    evenly over the level's bins (Migacz, 8-bit Inference with TensorRT, GTC 2017).
    """
    return _least_range(histogram, mode, lambda *r: _divergences(histogram, *r, _params(*r, bits, mode)))


def _params(low: Tensor, high: Tensor, bits: int, mode: LinearQuantMode) -> QuantParams:
    """(R, 1) parameters of (R,) ranges."""
    return params_of_range(low[:, None], high[:, None], bits, mode)


def _least_range(histogram: Histogram, mode: LinearQuantMode, loss: Loss) -> tuple[float, float]:
    """The range of least loss: symmetric ones all compared, else one bound after the other until neither moves."""
    parts = torch.arange(STEPS, 0, -1) / STEPS  # where two are equally good the wider one stands
    low, high = min(histogram.min, 0.0), max(histogram.max, 0.0)
    if low == high:
        return low, high
    if mode.symmetric:
        reaches = max(-low, high) * parts
        reach = reaches[loss(-reaches, reaches).argmin()].item()
        return -reach, reach
    lows, highs = low * parts, high * parts
    best, before = (lows[0], highs[0]), None
    while best != before:
        before = best
        new_high = highs[loss(best[0].expand(STEPS), highs).argmin()]
        best = lows[loss(lows, new_high.expand(STEPS)).argmin()], new_high
    return best[0].item(), best[1].item()


def _squared_errors(histogram: Histogram, params: QuantParams) -> Tensor:
    """(R,) sums of squared errors for (R, 1) parameters."""
    centers = histogram.centers
    errors = dequantize(quantize(centers, params), params) - centers
    return errors.double().square() @ histogram.counts


def _divergences(histogram: Histogram, low: Tensor, high: Tensor, params: QuantParams) -> Tensor:
    """(R,) divergences for (R,) ranges and their (R, 1) parameters; infinite for ranges without values."""
    centers, counts = histogram.centers, histogram.counts
    kept = counts * ((centers >= low[:, None]) & (centers <= high[:, None]))  # (R, B)
    filled = kept > 0
    levels = (quantize(centers, params) - params.q_min).long()
    per_level = torch.zeros(len(low), params.q_max - params.q_min + 1, dtype=torch.float64)
    values, bins = (per_level.scatter_add(1, levels, x.double()) for x in (kept, filled))
    spread = (values / bins.clamp(min=1)).gather(1, levels) * filled
    true = kept + _cut_off(counts, filled)
    p, q = (x / x.sum(1, keepdim=True) for x in (true, spread))
    divergence = torch.where(filled, p * (p / q).log(), 0.0).sum(1)
    return divergence.where(filled.any(1), torch.inf)


def _cut_off(counts: Tensor, filled: Tensor) -> Tensor:
    """(R, B): how many values below and above each range, at the first and the last of its filled bins."""
    place = torch.arange(len(counts))
    first = torch.where(filled, place, len(counts)).amin(1, keepdim=True)
    last = torch.where(filled, place, -1).amax(1, keepdim=True)
    below, above = ((counts * outside).sum(1, keepdim=True) for outside in (place < first, place > last))
    return below * (place == first) + above * (place == last)
