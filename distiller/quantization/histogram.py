"""Histograms of tensors, and the search for the range to quantize in them.

A range is judged by what quantizing the centers of the histogram's bins with it loses: in mean squared error or in
Kullback-Leibler divergence.

Shapes: B bins, R ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distiller.quantization.linear import LinearQuantMode, QuantParams, dequantize, params_of_range, quantize

# Percent of the values that are kept; the others are cut off in equal shares at both ends. Cutting off fewer hardly
# narrows a range.
PERCENTILE = 99.99
STEPS = 128  # The search moves bounds in steps of 1/128 of the whole range, which are two of 256 levels.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Histogram:
    """A histogram: how many of a tensor's values lie in each of B bins of equal width.

    Attributes:
        min: The lower end of the first bin.
        max: The upper end of the last bin.
        counts: (B,) float64, the number of values in each bin.
    """

    min: float
    max: float
    counts: Tensor

    @classmethod
    def from_plain(cls, value: object) -> Histogram:
        """Return the histogram that ``plain`` was called on.

        Args:
            value: What ``plain`` returned, or anything else, as it was read from a file.

        Raises:
            ValueError: the value does not have the form that ``plain`` returns.
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
        """Return the histogram as a map for a statistics file: min, max and the counts as a text of numbers."""
        counts = " ".join(str(int(count)) for count in self.counts.tolist())
        return {"min": self.min, "max": self.max, "counts": counts}

    @property
    def edges(self) -> Tensor:
        """The bounds of the bins, (B + 1,) float64; those of a constant reach half a unit to both sides."""
        apart = 0.5 * (self.min == self.max)
        return torch.linspace(self.min - apart, self.max + apart, len(self.counts) + 1, dtype=torch.float64)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, (B,) float32."""
        return ((self.edges[1:] + self.edges[:-1]) / 2).float()

    def within(self, low: float, high: float) -> Histogram:
        """Return the histogram of the values in [low, high]; the whole histogram where there are none."""
        counts = self.counts.where((self.centers >= low) & (self.centers <= high), 0)
        return Histogram(self.min, self.max, counts) if counts.any() else self


def percentile_range(histogram: Histogram) -> tuple[float, float]:
    """Return the range that keeps ``PERCENTILE`` percent of the values."""
    cut = (1 - PERCENTILE / 100) / 2 * histogram.counts.sum()
    return _bound_above(histogram, cut), _bound_below(histogram, cut)


def _bound_above(histogram: Histogram, count: Tensor) -> float:
    """Return the value below which ``count`` values lie, if the values of a bin are spread evenly over it."""
    reached = histogram.counts.cumsum(0)
    index = int((reached > count).nonzero()[0])
    part = 1 - (reached[index] - count) / histogram.counts[index]
    return histogram.min + (index + part.item()) * (histogram.max - histogram.min) / len(histogram.counts)


def _bound_below(histogram: Histogram, count: Tensor) -> float:
    """Return the value above which ``count`` values lie, if the values of a bin are spread evenly over it."""
    mirrored = Histogram(-histogram.max, -histogram.min, histogram.counts.flip(0))
    return -_bound_above(mirrored, count)


def least_squares_range(histogram: Histogram, mode: LinearQuantMode, bits: int) -> tuple[float, float]:
    """Return the range whose quantization has the least mean squared error."""
    return _least_range(histogram, mode, lambda *r: _squared_errors(histogram, _params(*r, bits, mode)))


def least_divergence_range(histogram: Histogram, mode: LinearQuantMode, bits: int) -> tuple[float, float]:
    """Return the range whose quantization has the least Kullback-Leibler divergence.

    The divergence compares two distributions: the values with those outside of the range moved to its ends, and what
    is left of that after quantization, when the values of each level are spread evenly over the level's bins
    (Migacz, 8-bit Inference with TensorRT, GTC 2017).
    """
    return _least_range(histogram, mode, lambda *r: _divergences(histogram, *r, _params(*r, bits, mode)))


def _params(low: Tensor, high: Tensor, bits: int, mode: LinearQuantMode) -> QuantParams:
    """Return the (R, 1) quantization parameters of (R,) ranges."""
    return params_of_range(low[:, None], high[:, None], bits, mode)


def _least_range(histogram: Histogram, mode: LinearQuantMode, loss: Loss) -> tuple[float, float]:
    """Return the range of least loss among those whose bounds lie on the steps.

    Symmetric ranges are all compared. Otherwise the best upper bound for the lower one is found, then the best lower
    bound for that upper one, and so on until neither moves.
    """
    parts = (
        torch.arange(STEPS, 0, -1) / STEPS
    )  # from wide to narrow: of two equally good ranges, the wider one wins
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
    """Return the (R,) sums of squared errors of quantizing with (R, 1) parameters."""
    centers = histogram.centers
    errors = dequantize(quantize(centers, params), params) - centers
    return errors.double().square() @ histogram.counts


def _divergences(histogram: Histogram, low: Tensor, high: Tensor, params: QuantParams) -> Tensor:
    """Return the (R,) divergences of (R,) ranges with (R, 1) parameters; infinite for a range without values."""
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
    """Return the (R, B) numbers of values outside of each range, each counted at the nearest filled bin in it."""
    place = torch.arange(len(counts))
    first = torch.where(filled, place, len(counts)).amin(1, keepdim=True)
    last = torch.where(filled, place, -1).amax(1, keepdim=True)
    below, above = ((counts * outside).sum(1, keepdim=True) for outside in (place < first, place > last))
    return below * (place == first) + above * (place == last)
