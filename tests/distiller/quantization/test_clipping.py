"""Every clip mode worked out by hand, the float32 rule, and the statistics of a tensor at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distiller.quantization import ClipMode, LinearQuantMode
from distiller.quantization.clipping import clip_range, column_reach, measure, required_statistics

STATS = {"min": -10.0, "max": 20.0, "avg_min": -6.0, "avg_max": 9.0, "mean": 1.0, "std": 2.0, "b": 1.5}
STATS["histogram"] = {"min": -10.0, "max": 20.0, "counts": "1 4 8 5 3 1"}
SHIFTED = STATS | {"mean": -3.0}

GAUSS = [1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2]
LAPLACE = [1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89]
LAPLACE_HALF = [1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16]


def bounds(stats, clip, symmetric=False, bits=8, n_stds=None, half_range=False) -> tuple[float, float]:
    mode = LinearQuantMode.SYMMETRIC if symmetric else LinearQuantMode.ASYMMETRIC_UNSIGNED
    low, high = clip_range(stats, ClipMode(clip), mode, bits, n_stds, half_range)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == (1,)
    return low.item(), high.item()


def test_modes_have_the_command_lines_names():
    assert [mode.value for mode in ClipMode] == [
        "none",
        "avg",
        "n_std",
        "gauss",
        "laplace",
        "percentile",
        "mse",
        "kl",
    ]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize(
    ("clip", "n_stds", "expected"),
    [
        ("none", None, (-10.0, 20.0)),
        ("avg", None, (-6.0, 9.0)),
        ("n_std", 3, (-5.0, 7.0)),
        ("n_std", 0.5, (0.0, 2.0)),
        ("n_std", 5.5, (-10.0, 12.0)),  # the minimum is nearer
        ("n_std", 100, (-10.0, 20.0)),
    ],
)
def test_none_avg_and_n_std(clip, n_stds, expected, symmetric, half_range):
    assert bounds(STATS, clip, symmetric, n_stds=n_stds, half_range=half_range) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("stats", [STATS, SHIFTED])
def test_symmetric_gauss_always_takes_the_first_row(bits, half_range, stats):
    reach = np.float32(abs(stats["mean"])) + np.float32(2.0 * GAUSS[bits - 1])
    assert bounds(stats, "gauss", True, bits, half_range=half_range) == (-reach, reach)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("stats", [STATS, SHIFTED])
def test_symmetric_laplace_always_takes_the_first_row(bits, half_range, stats):
    reach = np.float32(abs(stats["mean"])) + np.float32(1.5 * LAPLACE[bits])
    assert bounds(stats, "laplace", True, bits, half_range=half_range) == (-reach, reach)


@pytest.mark.parametrize("bits", range(1, 9))
def test_asymmetric_gauss(bits):
    alpha = np.float32(2.0 * GAUSS[bits - 1])
    low = max(np.float32(-6.0), np.float32(1.0) - alpha)
    assert bounds(STATS, "gauss", False, bits) == (low, low + 2 * alpha)
    alpha = np.float32(2.0 * GAUSS[bits])
    low = max(np.float32(-6.0), np.float32(1.0) - alpha)
    assert bounds(STATS, "gauss", False, bits, half_range=True) == (low, low + alpha)


@pytest.mark.parametrize("bits", range(9))
def test_asymmetric_laplace(bits):
    alpha = np.float32(1.5 * LAPLACE[bits])
    low = max(np.float32(-6.0), np.float32(1.0) - alpha)
    assert bounds(STATS, "laplace", False, bits) == (low, low + 2 * alpha)
    alpha = np.float32(1.5 * LAPLACE_HALF[bits])
    low = max(np.float32(-6.0), np.float32(1.0) - alpha)
    assert bounds(STATS, "laplace", False, bits, half_range=True) == (low, low + alpha)


def test_figures_by_hand():
    assert bounds(STATS, "gauss", True, 8) == pytest.approx((-8.84, 8.84))  # 1 + 2 * 3.92
    assert bounds(STATS, "gauss", False, 8) == pytest.approx((-6.0, 9.68))  # 1 - 7.84 is below avg_min
    assert bounds(STATS, "gauss", False, 4) == pytest.approx((-4.1, 6.1))  # alpha 5.1
    assert bounds(STATS, "gauss", False, 4, half_range=True) == pytest.approx((-4.86, 1.0))  # alpha 5.86
    assert bounds(STATS, "laplace", True, 2) == pytest.approx((-5.245, 5.245))  # 1 + 1.5 * 2.83
    assert bounds(STATS, "laplace", False, 3, half_range=True) == pytest.approx((-6.0, 1.53))  # alpha 7.53
    assert bounds(STATS | {"avg_min": 0.0}, "laplace", False, 8, half_range=True) == pytest.approx(
        (0.0, 16.74)
    )


def test_statistics_are_rounded_to_float32_before_use_and_alpha_once():
    stats = {"min": -1e9, "max": 1e9, "avg_min": -1e9, "mean": 0.1, "std": 0.3000000123, "b": 0.7000000321}
    mean = np.float32(0.1)
    alpha = np.float32(stats["b"] * 9.89)  # in double, rounded once
    assert alpha != np.float32(stats["b"]) * np.float32(9.89)
    assert bounds(stats, "laplace", True) == (-(mean + alpha), mean + alpha)
    low = mean - alpha
    assert bounds(stats, "laplace", False) == (low, low + np.float32(2) * alpha)
    reach = np.float32(2.1) * np.float32(stats["std"])  # n * std in float32
    assert reach != np.float32(2.1 * stats["std"])
    assert bounds(stats, "n_std", n_stds=2.1) == (mean - reach, mean + reach)
    assert bounds(stats | {"min": 0.1, "max": 0.7}, "none") == (np.float32(0.1), np.float32(0.7))


@pytest.mark.parametrize("trial", range(30))
def test_alpha_is_rounded_once_for_any_statistics(trial):
    draw = np.random.default_rng(trial)
    mean, std, b = draw.normal(), draw.gamma(2.0), draw.gamma(2.0)
    stats = {"mean": mean, "std": std, "b": b, "avg_min": -100.0}
    for bits in range(1, 9):
        for clip, spread, table in (("gauss", std, GAUSS[bits - 1]), ("laplace", b, LAPLACE[bits])):
            reach = np.abs(np.float32(mean)) + np.float32(spread * table)
            assert bounds(stats, clip, True, bits) == (-reach, reach)


@pytest.mark.parametrize(
    ("clip", "symmetric", "keys"),
    [
        ("none", True, {"min", "max"}),
        ("avg", False, {"avg_min", "avg_max"}),
        ("n_std", True, {"min", "max", "mean", "std"}),
        ("gauss", True, {"mean", "std"}),
        ("gauss", False, {"mean", "std", "avg_min"}),
        ("laplace", True, {"mean", "b"}),
        ("laplace", False, {"mean", "b", "avg_min"}),
        ("percentile", False, {"histogram"}),
        ("mse", True, {"histogram"}),
        ("kl", False, {"histogram"}),
    ],
)
def test_a_mode_needs_no_more_than_it_reads(clip, symmetric, keys):
    assert set(required_statistics(ClipMode(clip), symmetric)) == keys
    bounds({key: STATS[key] for key in keys}, clip, symmetric, n_stds=2)


def test_measure_by_hand():
    x = torch.tensor([[1.0, -3.0], [5.0, 2.0], [0.0, 7.0]])
    # mean 2, deviations -1 -5 3 0 -2 5
    expected = {
        "min": -3.0,
        "max": 7.0,
        "avg_min": (-3 + 2 + 0) / 3,
        "avg_max": (1 + 5 + 7) / 3,
        "mean": 2.0,
        "std": math.sqrt((1 + 25 + 9 + 0 + 4 + 25) / 5),  # unbiased
        "b": (1 + 5 + 3 + 0 + 2 + 5) / 6,
    }
    for clip in ClipMode:
        for symmetric in () if clip.of_histogram else (False, True):
            found = measure(x, clip, symmetric)
            assert set(required_statistics(clip, symmetric)) <= found.keys()
            for key, value in found.items():
                assert value.item() == pytest.approx(expected[key]), key
                assert value.dtype == torch.float32


def test_measure_takes_the_whole_row_of_a_tensor_of_more_axes():
    x = torch.arange(24.0).reshape(2, 3, 4)
    found = measure(x, ClipMode.AVG, False)
    assert (found["avg_min"].item(), found["avg_max"].item()) == ((0 + 12) / 2, (11 + 23) / 2)


def test_ranges_of_columns():
    """A column's own, cut where the layer is, and never narrower than a 16th of the layer's."""
    reach = column_reach(torch.tensor([0.0, 0.1, 2.0, 8.0, 20.0]), torch.tensor([16.0]))
    assert reach.tolist() == [1.0, 1.0, 2.0, 8.0, 16.0]


@pytest.mark.parametrize("high", [0.0, -2.0])
def test_columns_of_a_layer_that_is_0(high):
    assert column_reach(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([high])).tolist() == [0.0] * 3
