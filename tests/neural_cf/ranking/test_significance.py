"""Paired comparisons: McNemar's exact test and the bootstrap of a mean."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_cf.ranking import significance
from neural_cf.ranking.significance import bootstrap_interval, bootstrap_interval_of_few, mcnemar

counts = st.integers(0, 60)
values = st.lists(st.floats(-100, 100), min_size=1, max_size=30).map(np.array)


def hits(only_a: int, only_b: int, both: int = 3, neither: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Paired hits with so many pairs of each kind."""
    kinds = [(True, False)] * only_a + [(False, True)] * only_b
    kinds += [(True, True)] * both + [(False, False)] * neither
    a, b = np.array(kinds, dtype=bool).reshape(-1, 2).T
    return a, b


def by_fractions(only_a: int, only_b: int) -> Fraction:
    """The definition, summed in fractions."""
    n, m = only_a + only_b, min(only_a, only_b)
    return min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(m + 1)), 2**n))


# --- McNemar ---


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),  # nothing to tell apart
        (1, 0, 1.0),  # 2 / 2
        (0, 5, 0.0625),  # 2 / 32
        (6, 0, 0.03125),  # 2 / 64
        (1, 7, 0.0703125),  # 2 (1 + 8) / 256
        (2, 8, 0.109375),  # 2 (1 + 10 + 45) / 1024
        (4, 6, 0.75390625),  # 2 (1 + 10 + 45 + 120 + 210) / 1024
        (5, 5, 1.0),  # 2 * 638 / 1024 is above 1
    ],
)
def test_mcnemar_of_worked_examples(only_a, only_b, p):
    """Exactly: all of these are floats."""
    assert mcnemar(*hits(only_a, only_b)) == p


@given(counts, counts)
def test_mcnemar_is_its_definition(only_a, only_b):
    """To far below what is asked."""
    assert mcnemar(*hits(only_a, only_b)) == pytest.approx(float(by_fractions(only_a, only_b)), rel=1e-12)


@given(counts, counts, counts, counts, st.randoms(use_true_random=False))
def test_mcnemar_does_not_see_what_it_should_not(only_a, only_b, both, neither, random):
    """Neither which model is first, nor in which order the users are, nor pairs that agree."""
    a, b = hits(only_a, only_b, both, neither)
    p = mcnemar(a, b)
    assert 0 < p <= 1
    assert mcnemar(b, a) == p
    order = list(range(len(a)))
    random.shuffle(order)
    assert mcnemar(a[order], b[order]) == p
    assert mcnemar(*hits(only_a, only_b, 0, 0)) == p


@given(st.integers(2, 60))
def test_the_more_uneven_the_less_likely(n):
    """Of n pairs that differ."""
    found = [mcnemar(*hits(m, n - m)) for m in range(n // 2 + 1)]
    assert found == sorted(found)
    assert found[0] < found[1]


@pytest.mark.parametrize(("only_a", "only_b"), [(2400, 2600), (1000, 1500), (3900, 4100), (450, 550)])
def test_mcnemar_of_thousands(only_a, only_b):
    """Where 2^n is far beyond a float."""
    assert mcnemar(*hits(only_a, only_b)) == pytest.approx(float(by_fractions(only_a, only_b)), rel=1e-9)


def test_mcnemar_of_very_many():
    """Of 100,000 it is the normal distribution's; below float64's range it is 0."""
    assert mcnemar(*hits(49_800, 50_200)) == pytest.approx(math.erfc(399 / math.sqrt(2e5)), rel=1e-4)
    assert mcnemar(*hits(0, 100_000)) == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([True], [True, False]),
        ([1, 0], [True, False]),
        ([True, False], [0.0, 1.0]),
        ([[True]], [[True]]),
        (True, False),
    ],
)
def test_mcnemar_takes_pairs_of_bool(a, b):
    with pytest.raises(ValueError, match="bool"):
        mcnemar(np.array(a), np.array(b))


# --- bootstrap ---


def test_interval_of_two_values():
    """Means of two draws from {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: the quantiles are theirs."""
    assert bootstrap_interval(np.array([0.0, 1.0]), seed=1) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.0, 1.0]), seed=1, level=0.4) == (0.5, 0.5)


def test_interval_of_many_is_that_of_the_normal_distribution():
    """The mean plus and minus 1.96 standard errors, up to the error of 10,000 draws: 1.5 % of it, each end."""
    x = np.random.default_rng(0).normal(0.3, 2.0, size=6040)
    error = x.std() / math.sqrt(len(x))
    low, high = bootstrap_interval(x, seed=2)
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.08 * error)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.08 * error)
    low, high = bootstrap_interval(x, seed=2, level=0.5)
    assert high - low == pytest.approx(2 * 0.6745 * error, rel=0.05)


def test_interval_covers_the_mean_as_often_as_it_says():
    """Of 400 samples of a skewed distribution, close to 90 % (standard deviation 1.5 %)."""
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_interval(generator.exponential(size=100), seed, level=0.9, draws=500)
        covered += low <= 1 <= high
    assert 0.84 < covered / 400 < 0.94


@settings(max_examples=50)
@given(values, st.integers(0, 1000))
def test_interval_is_within_the_values_and_repeats(x, seed):
    """Of one seed one interval; turned around for the negated values, up to rounding."""
    low, high = bootstrap_interval(x, seed, draws=200)
    assert x.min() - 1e-9 <= low <= high <= x.max() + 1e-9
    assert bootstrap_interval(x, seed, draws=200) == (low, high)
    assert bootstrap_interval(-x, seed, draws=200) == pytest.approx((-high, -low), abs=1e-9)


@settings(max_examples=25)
@given(values, st.floats(-50, 50), st.floats(0.1, 10))
def test_interval_follows_its_values(x, shift, scale):
    """Moved and stretched with them, and narrower at a lower level."""
    low, high = bootstrap_interval(x, 5, draws=200)
    expected = (scale * low + shift, scale * high + shift)
    assert bootstrap_interval(scale * x + shift, 5, draws=200) == pytest.approx(expected, abs=1e-6)
    inner = bootstrap_interval(x, 5, level=0.5, draws=200)
    assert low <= inner[0] <= inner[1] <= high


def test_other_seeds_draw_otherwise():
    x = np.random.default_rng(1).normal(size=50)
    assert len({bootstrap_interval(x, seed, draws=100) for seed in range(5)}) == 5


def test_interval_in_parts(monkeypatch):
    """Every draw is made, however few fit at once."""
    x = np.random.default_rng(4).normal(size=100)
    for at_once in (1, 300, 999):
        monkeypatch.setattr(significance, "DRAWS_AT_ONCE", at_once)
        low, high = bootstrap_interval(x, seed=0, draws=2000)
        assert high - low == pytest.approx(2 * 1.96 * x.std() / 10, rel=0.1)
        assert low < x.mean() < high


@pytest.mark.parametrize("x", [[], [[1.0]], [1, 2], [True], [math.nan, 1.0], [math.inf]])
def test_differences_that_are_none(x):
    with pytest.raises(ValueError, match="differences"):
        bootstrap_interval(np.array(x), seed=0)


@pytest.mark.parametrize("settings", [{"level": 0.0}, {"level": 1.0}, {"level": math.nan}, {"draws": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(np.ones(3), seed=0, **settings)


# --- bootstrap of few distinct values ---


def test_interval_of_few_is_that_of_drawing_users(monkeypatch):
    """Up to the error of 10,000 draws each; in parts of any size."""
    x = np.random.default_rng(0).choice([-1.0, 0.0, 0.5, 1.0], p=[0.1, 0.6, 0.2, 0.1], size=500)
    expected = bootstrap_interval(x, seed=1)
    spread = expected[1] - expected[0]
    for at_once in (significance.DRAWS_AT_ONCE, 4000):
        monkeypatch.setattr(significance, "DRAWS_AT_ONCE", at_once)
        assert bootstrap_interval_of_few(x, seed=1) == pytest.approx(expected, abs=0.03 * spread)


def test_interval_of_few_by_hand():
    """The same two values as above."""
    assert bootstrap_interval_of_few(np.array([0.0, 1.0]), seed=1) == (0.0, 1.0)
    assert bootstrap_interval_of_few(np.array([0.0, 1.0]), seed=1, level=0.4) == (0.5, 0.5)
    assert bootstrap_interval_of_few(np.full(7, 0.25), seed=1) == (0.25, 0.25)


@pytest.mark.parametrize("bad", [np.array([]), np.array([1]), np.array([[1.0]]), np.array([np.nan])])
def test_interval_of_few_takes_what_the_other_takes(bad):
    with pytest.raises(ValueError, match="differences"):
        bootstrap_interval_of_few(bad, seed=1)
