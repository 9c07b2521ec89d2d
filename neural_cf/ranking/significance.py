"""Significance of the difference between two models that rank the same users' test items.

Comparing user by user, what is hard about a user is hard for both models and drops out of the difference.
"""

from __future__ import annotations

import math

import numpy as np

DRAWS_AT_ONCE = 1 << 21  # values drawn at once: 16 MB of indices and 16 MB of values


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the exact two-sided p value of McNemar's test (Psychometrika 12, 1947).

    The null hypothesis is that a hit is equally likely in both models. Only users for whom the models differ count: of
    n such users, X ~ Binomial(n, 1/2) have the hit in ``a``, and where the model with fewer of these hits has m of
    them, p = min(1, 2 P(X <= m)). The relative error of p is below 1e-9; a p below float64's range is 0.

    Args:
        a: (N,) bool, the first model's hits.
        b: (N,) bool, the second model's hits, of the same users in the same order.

    Returns:
        p, 1.0 where the models differ for no user.

    Raises:
        ValueError: ``a`` and ``b`` are not two bool arrays of one length.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"hits are {a.dtype} {a.shape} and {b.dtype} {b.shape}, not two bool (N,)")
    sides = int((a & ~b).sum()), int((b & ~a).sum())
    n, m = sum(sides), min(sides)
    # 2 P(X = m) comes from exact integers; P(X = m - 1), P(X = m - 2), ... follow as multiples of P(X = m).
    largest = 2 * math.comb(n, m) / 2**n
    down = np.arange(m, 0, -1, dtype=np.float64)
    return min(1.0, largest * (1 + float(np.cumprod(down / (n + 1 - down)).sum())))


def bootstrap_interval(
    differences: np.ndarray, seed: int, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Return the bootstrap's percentile interval of a mean.

    The method is that of Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Args:
        differences: (N,) float64, a value for each user.
        seed: The seed of the resampling; one seed always gives the same interval.
        level: The confidence level, above 0 and below 1.
        draws: How often N users are drawn with replacement.

    Returns:
        The interval's lower and upper end.

    Raises:
        ValueError: an argument is out of its range, or a difference is not finite.
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
    """Return the interval of ``bootstrap_interval`` faster, for differences with few distinct values.

    How often each value occurs among N users drawn with replacement is multinomial, so that a draw takes as many steps
    as there are values, not users: a metric at k has at most k + 1 values, and a difference of two models' metrics at
    most (k + 1)^2. Arguments and errors are those of ``bootstrap_interval``. The random numbers are drawn otherwise,
    so that the ends differ from its own within the bootstrap's sampling error.
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
    """Raise a ``ValueError`` where arguments of a bootstrap are out of their range."""
    if differences.dtype != np.float64 or differences.ndim != 1 or not differences.size:
        raise ValueError(
            f"differences are {differences.dtype} {differences.shape}, not float64 (N,) of N > 0"
        )
    if not np.isfinite(differences).all():
        raise ValueError("differences are not all finite")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level {level}, {draws} draws: level is between 0 and 1, draws are 1 or more")
