"""Clip modes: which part of a tensor's range is quantized, found in calibrated or measured statistics.

The modes gauss and laplace follow ACIQ (Banner et al., arXiv:1810.05723): they clip where the expected squared error of
a normal or a Laplace variable is least. That value is in units of the variable's std or of b, its mean absolute
deviation. The modes percentile, mse and kl assume no distribution: they look at the calibrated histogram.

Shapes: C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from distiller.quantization.histogram import (
    Histogram,
    least_divergence_range,
    least_squares_range,
    percentile_range,
)
from distiller.quantization.linear import LinearQuantMode


class ClipMode(Enum):
    """A way to find the range to quantize. The value of a member is its name on the command line."""

    NONE = "none"
    AVG = "avg"
    N_STD = "n_std"
    GAUSS = "gauss"
    LAPLACE = "laplace"
    PERCENTILE = "percentile"
    MSE = "mse"
    KL = "kl"

    @property
    def of_histogram(self) -> bool:
        """Whether the mode needs a calibrated histogram."""
        return self in (ClipMode.PERCENTILE, ClipMode.MSE, ClipMode.KL)


# The clipping value alpha by number of bits, in units of std or b. The rows under True are for a half-range tensor,
# which a ReLU has cut off at 0.
ACIQ_ALPHA = {
    ClipMode.LAPLACE: {
        False: (1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89),
        True: (1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16),
    },
    ClipMode.GAUSS: {
        False: (None, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
        True: (None, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2),
    },
}
ACIQ_MAX_BITS = 8
# No column's range is narrower than this share of the layer's range. A column that hardly ever fires may fire harder
# for users that were not calibrated on; and what is left to save in rounding is a 16th of a level of the layer.
NARROWEST_COLUMN = 1 / 16


def required_statistics(clip: ClipMode, symmetric: bool) -> tuple[str, ...]:
    """Return the keys of the statistics that ``clip_range`` reads in a mode."""
    if clip.of_histogram:
        return ("histogram",)
    if clip is ClipMode.NONE:
        return ("min", "max")
    if clip is ClipMode.AVG:
        return ("avg_min", "avg_max")
    if clip is ClipMode.N_STD:
        return ("min", "max", "mean", "std")
    spread = "b" if clip is ClipMode.LAPLACE else "std"
    return ("mean", spread) if symmetric else ("mean", spread, "avg_min")


def clip_range(
    statistics: Mapping[str, Any],
    clip: ClipMode,
    mode: LinearQuantMode,
    bits: int,
    n_stds: float | None = None,
    half_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the float range of a tensor that is to be quantized.

    Args:
        statistics: The statistics that ``required_statistics`` names. Calibrated ones are floats, those of the tensor
            at hand float32 scalars; a histogram is in the form that ``Histogram.plain`` returns.
        clip: How the range is found.
        mode: How the range will be mapped to integers.
        bits: The width of the integers; at most ``ACIQ_MAX_BITS`` for gauss and laplace.
        n_stds: How many standard deviations n_std keeps on each side of the mean.
        half_range: Whether the tensor is the output of a fused ReLU.

    Returns:
        The lower and the upper bound, (1,) float32 each.
    """

    def float32(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).reshape(1)

    if clip is ClipMode.NONE:
        return float32(statistics["min"]), float32(statistics["max"])
    if clip is ClipMode.AVG:
        return float32(statistics["avg_min"]), float32(statistics["avg_max"])
    if clip.of_histogram:
        histogram = Histogram.from_plain(statistics["histogram"])
        low, high = _range_of_histogram(histogram, clip, mode, bits)
        return float32(low), float32(high)
    mean = float32(statistics["mean"])
    if clip is ClipMode.N_STD:
        reach = n_stds * float32(statistics["std"])
        low = torch.maximum(float32(statistics["min"]), mean - reach)
        return low, torch.minimum(float32(statistics["max"]), mean + reach)

    spread = statistics["b" if clip is ClipMode.LAPLACE else "std"]
    # Calibrated statistics are doubles: their product with the table's entry is rounded to float32 once, afterwards.
    alpha = float32(spread * ACIQ_ALPHA[clip][half_range and not mode.symmetric][bits])
    if mode.symmetric:
        reach = mean.abs() + alpha
        return -reach, reach
    low = torch.maximum(float32(statistics["avg_min"]), mean - alpha)
    return low, low + (alpha if half_range else 2 * alpha)


def column_reach(column_max: Tensor, high: Tensor) -> Tensor:
    """Return the upper bound of the range of every column of a ReLU's output; the lower bound is 0.

    Args:
        column_max: (C,) float32, the largest calibrated value of each column.
        high: (1,) float32, the upper bound that ``clip_range`` found for the whole tensor. No column reaches beyond
            it. The modes that assume a distribution may return a bound below 0, which counts as 0.

    Returns:
        (C,) float32, each between ``NARROWEST_COLUMN`` times ``high`` and ``high``.
    """
    high = high.clamp(min=0)
    return torch.maximum(torch.minimum(column_max, high), NARROWEST_COLUMN * high)


def _range_of_histogram(
    histogram: Histogram, clip: ClipMode, mode: LinearQuantMode, bits: int
) -> tuple[float, float]:
    """Return the range that a clip mode finds in a histogram."""
    if clip is ClipMode.PERCENTILE:
        return percentile_range(histogram)
    estimate = least_squares_range if clip is ClipMode.MSE else least_divergence_range
    return estimate(histogram, mode, bits)


def measure(x: Tensor, clip: ClipMode, symmetric: bool) -> dict[str, Tensor]:
    """Return the statistics of a tensor that ``clip_range`` reads, float32 scalars by key.

    avg_min and avg_max are means over rows of each row's min and max, std is the unbiased standard deviation and b
    the mean absolute deviation from the mean.
    """
    rows = x.reshape(len(x), -1)
    functions = {
        "min": x.min,
        "max": x.max,
        "avg_min": lambda: rows.amin(1).mean(),
        "avg_max": lambda: rows.amax(1).mean(),
        "mean": x.mean,
        "std": x.std,
        "b": lambda: (x - x.mean()).abs().mean(),
    }
    return {key: functions[key]() for key in required_statistics(clip, symmetric)}
