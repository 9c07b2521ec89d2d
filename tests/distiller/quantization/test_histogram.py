"""Histograms, and the ranges found in them: worked out by hand, against brute force, and what always holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.quantization.clipping import ClipMode, clip_range
from distiller.quantization.histogram import (
    Histogram,
    least_divergence_range,
    least_squares_range,
    percentile_range,
)
from distiller.quantization.linear import LinearQuantMode, fake_quantize, params_of_range

SYM, ASYM_U = LinearQuantMode.SYMMETRIC, LinearQuantMode.ASYMMETRIC_UNSIGNED
ESTIMATORS = [ClipMode.PERCENTILE, ClipMode.MSE, ClipMode.KL]
RELATIVE = 1e-6


def histogram(counts, low: float = 0.0, high: float = 1.0) -> Histogram:
    return Histogram(low, high, torch.tensor(counts, dtype=torch.float64))


def of_values(values: np.ndarray, bins: int = 2048) -> Histogram:
    counts, edges = np.histogram(values, bins)
    return Histogram(float(edges[0]), float(edges[-1]), torch.from_numpy(counts).double())


@st.composite
def histograms(draw):
    counts = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=60).filter(any))
    low = draw(st.floats(-100, 100))
    return histogram(counts, low, low + draw(st.floats(1e-3, 100)))


def test_bins_are_equal_parts():
    found = histogram([1, 2, 3, 4], -1.0, 3.0)
    assert found.edges.tolist() == [-1, 0, 1, 2, 3]
    assert found.centers.tolist() == [-0.5, 0.5, 1.5, 2.5]


@given(histograms())
def test_as_plain_values_and_back(found):
    plain = found.plain()
    again = Histogram.from_plain(plain)
    assert isinstance(plain["counts"], str)
    assert (again.min, again.max, again.counts.tolist()) == (found.min, found.max, found.counts.tolist())


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1 2 3",
        {},
        {"min": 0.0, "max": 1.0},
        {"min": 0.0, "max": 1.0, "counts": [1, 2]},
        {"min": 0.0, "max": 1.0, "counts": ""},
        {"min": 0.0, "max": 1.0, "counts": "0 0"},
        {"min": 0.0, "max": 1.0, "counts": "1 -1"},
        {"min": 0.0, "max": 1.0, "counts": "1 2.5"},
        {"min": 0.0, "max": 1.0, "counts": "1 nan"},
        {"min": 0.0, "max": 1.0, "counts": "9223372036854775808"},
        {"min": 1.0, "max": 0.0, "counts": "1"},
        {"min": True, "max": 2.0, "counts": "1"},
        {"min": "0", "max": 1.0, "counts": "1"},
        {"min": 0.0, "max": float("inf"), "counts": "1"},
        {"min": float("nan"), "max": 1.0, "counts": "1"},
    ],
)
def test_what_is_no_histogram_is_a_value_error(value):
    with pytest.raises(ValueError):
        Histogram.from_plain(value)


def test_the_part_within_bounds():
    found = histogram([1, 2, 3, 4], -2.0, 2.0)
    assert found.within(0.0, float("inf")).counts.tolist() == [0, 0, 3, 4]
    assert found.within(-1.0, 1.0).counts.tolist() == [0, 2, 3, 0]
    assert found.within(5.0, 6.0) == found


def test_percentiles_of_even_values():
    # 10^6 values, of which 50 are cut off at each end: a twentieth of a bin of 1000.
    low, high = percentile_range(histogram([1000] * 1000, 0.0, 1000.0))
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(999.95)


def test_percentiles_equal_numpys():
    values = np.random.default_rng(0).normal(size=200_000)
    found = percentile_range(of_values(values))
    expected = np.percentile(values, [0.005, 99.995])
    assert found == pytest.approx(expected, abs=(values.max() - values.min()) / 2048)


def test_a_percentile_leaves_out_bins_without_values():
    assert percentile_range(histogram([0, 0, 10, 0], 0.0, 4.0)) == pytest.approx((2.0, 3.0), abs=1e-3)


@pytest.mark.parametrize("mode", list(LinearQuantMode))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_squared_error_is_the_least_of_all_symmetric_ranges(mode, bits):
    values = np.random.default_rng(bits).laplace(size=20_000)
    found = of_values(values, 256)

    def error(low: float, high: float) -> float:
        params = params_of_range(torch.tensor([low]), torch.tensor([high]), bits, mode)
        return (
            (fake_quantize(found.centers, params) - found.centers).double().square() @ found.counts
        ).item()

    best = error(*least_squares_range(found, mode, bits))
    reach = max(-found.min, found.max)
    others = [error(-part * reach, part * reach) for part in np.linspace(0.01, 1, 100)]
    assert best <= min(others) * (1 + 0.02)
    if bits < 8:
        assert best < 0.9 * error(-reach, reach)


def test_with_a_level_for_every_bin_nothing_is_lost():
    found = histogram([5] * 16, 0.0, 16.0)
    for estimate in (least_squares_range, least_divergence_range):
        low, high = estimate(found, ASYM_U, 16)
        assert low == 0
        assert high >= 15.5  # the middle of the last bin


@pytest.mark.parametrize("estimate", [least_squares_range, least_divergence_range])
@pytest.mark.parametrize("mode", [SYM, ASYM_U])
def test_one_far_value_is_clipped_for_the_sake_of_all_others(estimate, mode):
    values = np.append(np.random.default_rng(0).normal(size=100_000), 60.0)
    low, high = estimate(of_values(values), mode, 4)
    assert high < 15
    assert low == -high if mode is SYM else low < -1


def divergence(found: Histogram, low: float, high: float, bits: int, mode: LinearQuantMode) -> float:
    """The Kullback-Leibler divergence of a range, level by level."""
    params = params_of_range(torch.tensor([low]), torch.tensor([high]), bits, mode)
    levels = fake_quantize(found.centers, params).tolist()
    centers, counts = found.centers.tolist(), found.counts.tolist()
    kept = [i for i, x in enumerate(centers) if low <= x <= high and counts[i]]
    if not kept:
        return float("inf")
    true = {i: counts[i] for i in kept}
    true[kept[0]] += sum(counts[: kept[0]])
    true[kept[-1]] += sum(counts[kept[-1] + 1 :])
    result = 0.0
    for i in kept:
        same = [j for j in kept if levels[j] == levels[i]]
        blurred = sum(counts[j] for j in same) / len(same) / sum(counts[j] for j in kept)
        p = true[i] / sum(true.values())
        result += p * np.log(p / blurred)
    return result


@settings(deadline=None, max_examples=30)
@given(histograms(), st.sampled_from([SYM, LinearQuantMode.SYMMETRIC_RESTRICTED]), st.integers(2, 4))
def test_the_divergence_is_the_least_of_all_symmetric_ranges(found, mode, bits):
    reach = max(-found.min, found.max)
    ranges = torch.arange(1, 129) / 128 * reach
    least = min(divergence(found, -r, r, bits, mode) for r in ranges.tolist())
    low, high = least_divergence_range(found, mode, bits)
    assert divergence(found, low, high, bits, mode) == pytest.approx(least, abs=1e-9)


def test_evenly_filled_levels_lose_nothing():
    assert least_divergence_range(histogram([3, 3, 9, 9], 0.0, 4.0), ASYM_U, 1) == (0.0, 4.0)


@settings(deadline=None)
@given(histograms(), st.sampled_from(list(LinearQuantMode)), st.integers(2, 8))
def test_ranges_lie_within_the_histograms_and_keep_zero(found, mode, bits):
    low, high = min(found.min, 0.0), max(found.max, 0.0)
    reach = max(-low, high)
    for estimate in (least_squares_range, least_divergence_range):
        lower, upper = estimate(found, mode, bits)
        assert lower <= 0 <= upper
        assert lower < upper
        bounds = (-reach, reach) if mode.symmetric else (low, high)
        assert bounds[0] * (1 + RELATIVE) <= lower
        assert upper <= bounds[1] * (1 + RELATIVE)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", [SYM, ASYM_U])
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_constant_has_a_range(estimator, mode, value):
    constant = histogram([7], value, value)
    low, high = clip_range({"histogram": constant.plain()}, estimator, mode, 8)
    params = params_of_range(low, high, 8, mode)
    assert fake_quantize(torch.tensor([value]), params).item() == pytest.approx(value, abs=3.1 / 255)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bounds_are_float32(estimator):
    values = np.random.default_rng(1).normal(size=1000)
    low, high = clip_range({"histogram": of_values(values).plain()}, estimator, SYM, 8)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == (1,)
