"""Two models compared user by user: is what one gains over the other more than chance?

Both rank the same users' test items, so that what is hard about a user is hard for both and drops out of differences.
"""

from __future__ import annotations

import math

import numpy as np

DRAWS_AT_ONCE = 1 << 21  # values resampled at once: 16 MB of indices and as much of values


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """The exact two-sided p value of McNemar's test (Psychometrika 12, 1947) that hits are equally likely in both.

    Only pairs that differ count: of n of them, X ~ Binomial(n, 1/2) have the hit in ``a``, and with m of them on the
    rarer side p = min(1, 2 P(X <= m)). Its relative error is below 1e-9; below float64's range it is 0.

    Args:
        a: (N,) bool, the first model's hits.
        b: (N,) bool, the second one's, of the same users in the same order.

    Returns:
        p, 1.0 where no pair differs.

    Raises:
        ValueError: not two arrays of that form.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"hits are {a.dtype} {a.shape} and {b.dtype} {b.shape}, not two bool (N,)")
    sides = int((a & ~b).sum()), int((b & ~a).sum())
    n, m = sum(sides), min(sides)
    # P(X = m) from integers of any size, and what P(X = m - 1), P(X = m - 2), ... are of it.
    largest = 2 * math.comb(n, m) / 2**n
    down = np.arange(m, 0, -1, dtype=np.float64)
    return min(1.0, largest * (1 + float(np.cumprod(down / (n + 1 - down)).sum())))


def bootstrap_interval(
    differences: np.ndarray, seed: int, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """The percentile interval of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        differences: (N,) float64, one of each user.
        seed: Of the resampling: one seed gives one interval.
        level: The share of samples whose interval has the true mean, about; above 0 and below 1.
        draws: How often N users are drawn with replacement.

    Returns:
        The interval's lower and upper end.

    Raises:
        ValueError: an argument out of its range, or differences that are not finite.
    """
    differences = np.asarray(differences)
    check_differences(differences, level, draws)
    generator = np.random.default_rng(seed)
    nb_users = len(differences)
    means = np.empty(draws)
    part = max(1, DRAWS_AT_ONCE // nb_users)
    for start in range(0, draws, part):
        chosen = generator.integers(nb_users, size=(min(part, draws - start), nb_users))
        means[start : start + part] = differences[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval_of_few(
    differences: np.ndarray, seed: int, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """``bootstrap_interval`` of differences with few distinct values, without drawing every user.

    How often each value is among N users drawn with replacement is multinomial, so that a draw costs as many steps as
    there are values: of metrics at k, k + 1 of a model and at most their square of two. Arguments and errors are
    those of ``bootstrap_interval``; another random stream gives other ends, within what draws leave open.
    """
    check_differences(differences, level, draws)
    values, counts = np.unique(differences, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    part = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, draws, part):
        size = min(part, draws - start)
        drawn = generator.multinomial(len(differences), counts / len(differences), size=size)
        means[start : start + size] = drawn @ values / len(differences)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def check_differences(differences: np.ndarray, level: float, draws: int) -> None:
    """Raise a ``ValueError`` for arguments of a bootstrap that are out of their range."""
    if differences.dtype != np.float64 or differences.ndim != 1 or not differences.size:
        raise ValueError(
            f"differences are {differences.dtype} {differences.shape}, not float64 (N,) of N > 0"
        )
    if not np.isfinite(differences).all():
        raise ValueError("differences are not all finite")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level {level}, {draws} draws: level is between 0 and 1, draws are 1 or more")
