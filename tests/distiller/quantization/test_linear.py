"""Linear quantization against numbers worked out by hand, and properties that hold for any range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distiller.quantization.linear import (
    LinearQuantMode,
    QuantParams,
    approximate_scale,
    dequantize,
    fake_quantize,
    integer_range,
    params_of_range,
    quantize,
    scale_of_width,
    storage_dtype,
)

SYM, RESTRICTED = LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC_RESTRICTED
UNSIGNED, SIGNED = LinearQuantMode.ASYMMETRIC_UNSIGNED, LinearQuantMode.ASYMMETRIC_SIGNED


def params(low: float, high: float, bits: int, mode: LinearQuantMode) -> QuantParams:
    return params_of_range(torch.tensor([low]), torch.tensor([high]), bits, mode)


def numbers(found: QuantParams) -> tuple[float, float, int, int]:
    return found.scale.item(), found.zero_point.item(), found.q_min, found.q_max


def test_modes_have_the_command_lines_names():
    assert {mode.value: mode for mode in LinearQuantMode} == {
        "sym": SYM,
        "sym_restr": RESTRICTED,
        "asym_u": UNSIGNED,
        "asym_s": SIGNED,
    }
    assert [mode.symmetric for mode in (SYM, RESTRICTED, UNSIGNED, SIGNED)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("mode", "bits", "expected"),
    [
        (SYM, 8, (-128, 127)),
        (SYM, 4, (-8, 7)),
        (SYM, 1, (-1, 0)),
        (SYM, 32, (-(2**31), 2**31 - 1)),
        (RESTRICTED, 8, (-127, 127)),
        (RESTRICTED, 2, (-1, 1)),
        (UNSIGNED, 8, (0, 255)),
        (UNSIGNED, 1, (0, 1)),
        (UNSIGNED, 16, (0, 65535)),
        (SIGNED, 8, (-128, 127)),
        (SIGNED, 3, (-4, 3)),
    ],
)
def test_integer_ranges(mode, bits, expected):
    assert integer_range(bits, mode) == expected


# Ranges and bits whose scale is exact in float32: (mode, bits, low, high, scale, zero point).
BY_HAND = [
    (SYM, 8, -1.0, 2.0, 127.5 / 2, 0),
    (SYM, 8, -4.0, 2.0, 127.5 / 4, 0),
    (SYM, 2, -1.0, 0.5, 1.5, 0),
    (SYM, 1, 0.0, 1.0, 0.5, 0),
    (SYM, 4, 0.25, 0.5, 15.0, 0),
    (SYM, 4, -0.5, -0.25, 15.0, 0),
    (SYM, 8, 0.0, 0.0, 1.0, 0),
    (RESTRICTED, 8, -1.0, 2.0, 63.5, 0),
    (RESTRICTED, 4, -4.0, 1.0, 1.75, 0),
    (RESTRICTED, 2, -0.125, 0.0, 8.0, 0),
    (RESTRICTED, 8, 0.0, 0.0, 1.0, 0),
    (UNSIGNED, 8, -1.0, 1.0, 127.5, -128),  # round(-127.5): half to even
    (UNSIGNED, 8, 0.0, 4.0, 63.75, 0),
    (UNSIGNED, 8, -4.0, 0.0, 63.75, -255),
    (UNSIGNED, 8, 1.0, 4.0, 63.75, 0),  # widened to [0, 4]
    (UNSIGNED, 8, -4.0, -1.0, 63.75, -255),  # widened to [-4, 0]
    (UNSIGNED, 2, -1.0, 3.0, 0.75, -1),
    (UNSIGNED, 4, -2.0, 6.0, 1.875, -4),
    (UNSIGNED, 1, -0.25, 0.25, 2.0, 0),  # round(-0.5): half to even
    (UNSIGNED, 8, 0.0, 0.0, 1.0, 0),
    (SIGNED, 8, -1.0, 1.0, 127.5, 0),
    (SIGNED, 8, 0.0, 4.0, 63.75, 128),
    (SIGNED, 8, -4.0, 0.0, 63.75, -127),
    (SIGNED, 8, 1.0, 4.0, 63.75, 128),
    (SIGNED, 4, -2.0, 6.0, 1.875, 4),
    (SIGNED, 2, -1.0, 3.0, 0.75, 1),
    (SIGNED, 8, 0.0, 0.0, 1.0, 128),
]


@pytest.mark.parametrize(("mode", "bits", "low", "high", "scale", "zero_point"), BY_HAND)
def test_scale_and_zero_point(mode, bits, low, high, scale, zero_point):
    assert numbers(params(low, high, bits, mode)) == (scale, zero_point, *integer_range(bits, mode))
    assert params(low, high, bits, mode).scale.dtype == torch.float32


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("mode", LinearQuantMode)
def test_a_range_of_no_width_has_scale_one(mode, bits):
    assert params(0.0, 0.0, bits, mode).scale.item() == 1.0


@pytest.mark.parametrize(
    ("low", "high", "mode"),
    [(1.0, -1.0, UNSIGNED), (1.0, -1.0, SIGNED), (0.5, 0.25, UNSIGNED), (-1.0, -2.0, SIGNED)],
)
def test_an_upside_down_asymmetric_range_is_a_value_error(low, high, mode):
    with pytest.raises(ValueError):
        params(low, high, 8, mode)


def test_one_upside_down_channel_is_a_value_error():
    with pytest.raises(ValueError):
        params_of_range(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), 8, UNSIGNED)


def test_a_negative_largest_magnitude_is_a_value_error():
    with pytest.raises(ValueError):
        scale_of_width(torch.tensor([1.0, -0.5]), 127.5)
    assert scale_of_width(torch.tensor([0.5, 0.0]), 127.5).tolist() == [255.0, 1.0]


def test_restricted_one_bit_has_no_level_and_is_a_value_error():
    with pytest.raises(ValueError):
        params(-1.0, 1.0, 1, RESTRICTED)


@pytest.mark.parametrize(
    ("mode", "x", "expected"),
    [
        # scale 1, zero point 0: ties go to the even neighbour
        (SYM, [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, -3.51], [0, 2, 2, 0, -2, -2, 0, -4]),
        (SYM, [127.4, 127.5, 200.0, 1e30, -128.4, -129.0, -1e30], [127, 127, 127, 127, -128, -128, -128]),
        (RESTRICTED, [126.5, 128.0, -127.4, -128.0], [126, 127, -127, -127]),
        (UNSIGNED, [-0.5, -1.0, 0.5, 254.5, 255.5, 300.0], [0, 0, 0, 254, 255, 255]),
    ],
)
def test_rounding_half_to_even_and_saturation(mode, x, expected):
    grid = QuantParams(torch.ones(1), torch.zeros(1), *integer_range(8, mode))
    q = quantize(torch.tensor(x), grid)
    assert q.dtype == torch.float32
    assert q.tolist() == expected


def test_the_zero_point_is_subtracted_before_rounding():
    grid = QuantParams(torch.tensor([2.0]), torch.tensor([-3.0]), 0, 255)
    x = torch.tensor([-1.5, -1.25, 0.0, 0.25, 0.75, 10.0, 1000.0])
    assert quantize(x, grid).tolist() == [0, 0, 3, 4, 4, 23, 255]  # 2x + 3
    assert dequantize(torch.tensor([0.0, 3.0, 23.0, 255.0]), grid).tolist() == [-1.5, 0.0, 10.0, 126.0]
    assert fake_quantize(x, grid).tolist() == [-1.5, -1.5, 0.0, 0.5, 0.5, 10.0, 126.0]


def test_quantizing_leaves_its_input_alone():
    x = torch.tensor([0.3, 5.0])
    fake_quantize(x, params(-1.0, 1.0, 4, SYM))
    assert x.tolist() == pytest.approx([0.3, 5.0])


@pytest.mark.parametrize(
    ("scale", "bits", "expected"),
    [
        (0.3, 8, 153 / 512),  # 255 / 0.3 = 850, h = 9, floor(153.6)
        (0.3, 4, 9 / 32),  # 15 / 0.3 = 50, h = 5, floor(9.6)
        (0.3, 2, 2 / 8),  # 3 / 0.3 = 10, h = 3, floor(2.4)
        (1.0, 8, 1.0),
        (100.0, 4, 96.0),  # 0.15, h = -3, floor(12.5) * 8
        (100.0, 8, 100.0),  # 2.55, h = 1, floor(200) / 2
        (0.001, 8, 131 / 131072),  # 255000, h = 17, floor(131.07)
        (255.0, 8, 255.0),  # h = 0
        (256.0, 8, 256.0),  # h = -1
        (257.0, 8, 256.0),  # h = -1, floor(128.5) * 2
        (5.0, 2, 4.0),  # 0.6, h = -1, floor(2.5) * 2
        (0.75, 16, 0.75),
    ],
)
def test_approximate_scale(scale, bits, expected):
    assert approximate_scale(torch.tensor([scale]), bits).item() == expected


def test_approximate_scale_works_by_element_and_may_be_off():
    scale = torch.tensor([0.3, 100.0, 5.0])
    assert approximate_scale(scale, 4).tolist() == [9 / 32, 96.0, 5.0]
    assert approximate_scale(scale, None) is scale


@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(2, 16))
def test_approximate_scale_is_a_multiplier_of_so_many_bits_not_above_the_scale(scale, bits):
    found = approximate_scale(torch.tensor([scale]), bits).item()
    assert found <= scale
    assert found > scale * (1 - 2.0 ** (2 - bits))
    mantissa, _ = np.frexp(found)
    assert mantissa * 2**bits == int(mantissa * 2**bits)


# --- properties ---

MODES = st.sampled_from(list(LinearQuantMode))
BITS = st.integers(2, 12)
ENDS = st.floats(-1000, 1000, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
RANGES = st.tuples(ENDS, ENDS).map(sorted)


def inside(low: float, high: float, mode: LinearQuantMode) -> Tensor:
    """Values that the range covers: of a symmetric mode [-max_abs, max_abs]."""
    reach = max(abs(low), abs(high))
    low, high = (-reach, reach) if mode.symmetric else (min(low, 0.0), max(high, 0.0))
    return torch.linspace(low, high, 64)


@given(RANGES, BITS, MODES)
def test_values_in_range_come_back_within_half_a_quantum(ends, bits, mode):
    low, high = ends
    grid = params(low, high, bits, mode)
    x = inside(low, high, mode)
    quantum = 1 / grid.scale.double()
    # Symmetric has one level less on the positive side; an asymmetric zero point moves the range by half a quantum.
    slack = {SYM: 1.0, RESTRICTED: 0.5}.get(mode, 1.0)
    error = (fake_quantize(x, grid).double() - x.double()).abs()
    assert (error <= quantum * slack + 1e-5 * x.abs().max() + 1e-9).all()
    interior = quantize(x, grid)
    middle = (interior > grid.q_min) & (interior < grid.q_max)
    assert (error[middle] <= quantum * 0.5 + 1e-5 * x.abs().max() + 1e-9).all()


@given(RANGES, st.integers(1, 16), st.sampled_from([SYM, UNSIGNED, SIGNED]))
def test_zero_maps_to_exactly_zero(ends, bits, mode):
    grid = params(*ends, bits, mode)
    assert fake_quantize(torch.zeros(1), grid).item() == 0.0
    q = quantize(torch.zeros(1), grid).item()
    assert q == -grid.zero_point.item()
    assert grid.q_min <= q <= grid.q_max


@given(RANGES, st.integers(2, 16), MODES, st.integers(0, 1000))
def test_quantizing_what_is_quantized_changes_nothing(ends, bits, mode, seed):
    grid = params(*ends, bits, mode)
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * (max(map(abs, ends)) + 0.1)
    q = quantize(x, grid)
    assert ((q >= grid.q_min) & (q <= grid.q_max) & (q == q.round())).all()
    once = dequantize(q, grid)
    assert torch.equal(quantize(once, grid), q)
    assert torch.equal(fake_quantize(once, grid), once)


@given(RANGES, BITS, MODES)
def test_quantization_is_monotone(ends, bits, mode):
    q = quantize(torch.linspace(-2000, 2000, 401), params(*ends, bits, mode))
    assert (q.diff() >= 0).all()


@given(st.lists(RANGES, min_size=1, max_size=5), BITS, MODES)
def test_channels_are_quantized_each_by_itself(ranges, bits, mode):
    low, high = torch.tensor(ranges).unbind(1)
    together = params_of_range(low, high, bits, mode)
    assert together.scale.shape == together.zero_point.shape == (len(ranges),)
    for channel, ends in enumerate(ranges):
        alone = params(*ends, bits, mode)
        assert together.scale[channel] == alone.scale
        assert together.zero_point[channel] == alone.zero_point


@pytest.mark.parametrize("mode", LinearQuantMode)
@pytest.mark.parametrize("bits", [2, 8, 9, 15, 16])
def test_storage_holds_every_integer(mode, bits):
    low, high = integer_range(bits, mode)
    limits = torch.iinfo(storage_dtype(low, high))
    assert limits.min <= low < high <= limits.max
    assert limits.bits <= (8 if bits <= 8 else 32)
