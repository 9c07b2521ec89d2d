"""The settings of every layer: those of the whole model, with the changes that an override makes for the layer.

A ``Request`` holds settings as a user gives them; checked, they become ``ActivationSettings`` and ``WeightSettings``,
which the quantized modules compute their parameters with.

Shapes: M output features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

from distiller.quantization.clipping import (
    ACIQ_ALPHA,
    ACIQ_MAX_BITS,
    ClipMode,
    clip_range,
    column_reach,
    measure,
)
from distiller.quantization.linear import LinearQuantMode, QuantParams, approximate_scale, params_of_range
from distiller.quantization.statistics import FLOAT32_MAX
from distiller.system.cli import InputError

MAX_BITS = 16  # of activations and of weights
ACCUMULATOR_BITS = 32  # of every accumulator but Linear's, which has a setting
OVERRIDE_KEYS = {"bits_activations", "bits_weights", "clip_acts", "clip_n_stds", "mode"}

Choice = TypeVar("Choice", bound=Enum)


@dataclass(frozen=True)
class ActivationSettings:
    """The settings by which the activations of one layer are quantized.

    Attributes:
        bits: The width of the integers, 1 or more.
        mode: How a range is mapped to integers.
        clip: How the range is found.
        n_stds: How many standard deviations ``ClipMode.N_STD`` keeps on each side of the mean.
        scale_bits: Multiplier bits that scales are cut to; None for no such limit.
    """

    bits: int
    mode: LinearQuantMode
    clip: ClipMode = ClipMode.NONE
    n_stds: float | None = None
    scale_bits: int | None = None

    def params(
        self, statistics: dict, half_range: bool = False, column_max: Tensor | None = None
    ) -> QuantParams:
        """Return the parameters of a tensor by its statistics.

        The zero point is that of the scale before it is cut to ``scale_bits``.

        Args:
            statistics: The statistics that ``clipping.required_statistics`` names.
            half_range: Whether the tensor is the output of a fused ReLU.
            column_max: (M,) float32, the largest values of the columns of a ReLU's output, to give every column a
                scale of its own.

        Returns:
            (1,) parameters, or (M,) with ``column_max``.
        """
        low, high = clip_range(statistics, self.clip, self.mode, self.bits, self.n_stds, half_range)
        if column_max is not None:
            high = column_reach(column_max, high)
            low = torch.zeros_like(high)
        exact = params_of_range(low, high, self.bits, self.mode)
        scale = approximate_scale(exact.scale, self.scale_bits)
        return QuantParams(scale, exact.zero_point, exact.q_min, exact.q_max)

    def params_of_tensor(self, x: Tensor, half_range: bool = False) -> QuantParams:
        """Return the (1,) parameters of a tensor by its own values; ``half_range`` as for ``params``."""
        return self.params(measure(x, self.clip, self.mode.symmetric), half_range)


@dataclass(frozen=True)
class WeightSettings:
    """The settings by which the weights of one layer are quantized.

    Attributes:
        bits: The width of the integers, 1 or more.
        mode: How a range is mapped to integers.
        per_channel: Whether every output feature of a Linear has a scale of its own.
        accumulator_bits: The width of a Linear's accumulator.
    """

    bits: int
    mode: LinearQuantMode
    per_channel: bool = False
    accumulator_bits: int = ACCUMULATOR_BITS

    def params(self, weight: Tensor) -> QuantParams:
        """Return the parameters of a Linear's (M, K) weight over its whole range: (M,) per channel, else (1,)."""
        rows = weight.detach() if self.per_channel else weight.detach().reshape(1, -1)
        return params_of_range(rows.amin(1), rows.amax(1), self.bits, self.mode)


@dataclass(frozen=True)
class Request:
    """Settings as a user gives them: for the whole model or, with the changes of an override, for one layer.

    Attributes:
        bits_activations: Bits of activations, 1 .. 16; 0 or None leaves them in float.
        bits_weights: Bits of weights, 1 .. 16; 0 or None leaves them in float.
        bits_accum: Bits of Linear's accumulator, 1 .. 32.
        mode_activations: How ranges of activations are mapped to integers.
        mode_weights: How ranges of weights are mapped to integers.
        clip_acts: How ranges of activations are found.
        clip_n_stds: How many standard deviations ``ClipMode.N_STD`` keeps on each side of the mean, above 0.
        per_channel_wts: Whether every output feature of a Linear has a scale of its own for its weights.
        scale_approx_mult_bits: Multiplier bits that scales are cut to, 2 .. 31; None for no such limit.
    """

    bits_activations: int | None
    bits_weights: int | None
    bits_accum: int
    mode_activations: LinearQuantMode
    mode_weights: LinearQuantMode
    clip_acts: ClipMode
    clip_n_stds: float | None
    per_channel_wts: bool
    scale_approx_mult_bits: int | None

    def override(self, changes: Mapping[str, Any]) -> Request:
        """Return these settings with the changes of an override."""
        values = dict(vars(self))
        for key, value in changes.items():
            if key == "mode":
                values["mode_activations"], values["mode_weights"] = modes(value)
            else:
                values[key] = choice(ClipMode, value, key) if key == "clip_acts" else value
        return Request(**values)

    def activations(self, layer: str) -> ActivationSettings | None:
        """Return the settings of a layer's activations; None where they stay in float.

        Raises:
            InputError: a setting is out of its range; the message names the flag and the layer.
        """
        bits = _bits(self.bits_activations, "--qe-bits-acts (bits_activations)", layer)
        if not bits:
            return None
        _check_clip(self.clip_acts, self.clip_n_stds, bits, layer)
        _check_levels(self.mode_activations, bits, layer)
        return ActivationSettings(
            bits, self.mode_activations, self.clip_acts, self.clip_n_stds, self.scale_approx_mult_bits
        )

    def weights(self, layer: str) -> WeightSettings | None:
        """Return the settings of a layer's weights; None where they stay in float.

        Raises:
            InputError: a setting is out of its range; the message names the flag and the layer.
        """
        bits = _bits(self.bits_weights, "--qe-bits-wts (bits_parameters, bits_weights)", layer)
        if not bits:
            return None
        _check_levels(self.mode_weights, bits, layer)
        return WeightSettings(bits, self.mode_weights, self.per_channel_wts, self.bits_accum)


def _bits(bits: int | None, flag: str, layer: str) -> int:
    """Return the number of bits, 0 for float; raise an ``InputError`` where it is out of its range."""
    if bits is None or (type(bits) is int and 0 <= bits <= MAX_BITS):
        return bits or 0
    raise InputError(f"{flag}: {bits!r} for layer {layer}; it takes 1 to {MAX_BITS} bits, or 0 for float")


def _check_levels(mode: LinearQuantMode, bits: int, layer: str) -> None:
    """Raise an ``InputError`` where a mode has no level but 0 at a number of bits."""
    if mode is LinearQuantMode.SYMMETRIC_RESTRICTED and bits == 1:
        raise InputError(f"--qe-mode: {mode.value} with 1 bit for layer {layer} has no level but 0")


def _check_clip(clip: ClipMode, n_stds: float | None, bits: int, layer: str) -> None:
    """Raise an ``InputError`` where a clip mode lacks what it needs or takes fewer bits."""
    number = isinstance(n_stds, int | float) and not isinstance(n_stds, bool)
    if clip is ClipMode.N_STD and not (number and 0 < n_stds <= FLOAT32_MAX):
        raise InputError(
            f"--qe-clip-acts n_std for layer {layer} needs --qe-clip-n-stds above 0, not {n_stds!r}"
        )
    if clip in ACIQ_ALPHA and bits > ACIQ_MAX_BITS:
        raise InputError(
            f"--qe-clip-acts {clip.value} for layer {layer} takes up to {ACIQ_MAX_BITS} bits, not {bits}"
        )


def choice(kind: type[Choice], value: object, what: str) -> Choice:
    """Return the member of an enumeration that a value stands for.

    Args:
        kind: The enumeration.
        value: The member itself, or its value or name, in upper or lower case.
        what: What the message names: a flag or a key.

    Raises:
        InputError: the value stands for no member.
    """
    if isinstance(value, kind):
        return value
    for member in kind:
        if isinstance(value, str) and value.lower() in (member.value, member.name.lower()):
            return member
    raise InputError(f"{what}: {value!r} is none of {', '.join(member.value for member in kind)}")


def modes(value: object) -> tuple[LinearQuantMode, LinearQuantMode]:
    """Return the modes of activations and of weights.

    Args:
        value: One mode for both, or a map with the keys ``activations`` and ``weights``.

    Raises:
        InputError: the value is neither.
    """
    if not isinstance(value, Mapping):
        mode = choice(LinearQuantMode, value, "mode")
        return mode, mode
    if value.keys() != {"activations", "weights"}:
        raise InputError(f"mode: a map of it has activations and weights, not {', '.join(map(str, value))}")
    return tuple(choice(LinearQuantMode, value[key], "mode") for key in ("activations", "weights"))


def requests_by_layer(
    default: Request, overrides: Mapping[str, Mapping[str, Any]], layers: Iterable[str]
) -> dict[str, Request]:
    """Return the settings of every layer by its name.

    Args:
        default: The settings of a layer that no override matches.
        overrides: By a regular expression that matches whole layer names, the changes for these layers; the first
            expression that matches a layer counts.
        layers: The names of the layers.

    Raises:
        InputError: a pattern is no regular expression or matches no layer, or an override has an unknown key.
    """
    layers = list(layers)
    if not isinstance(overrides, Mapping):
        raise InputError(f"overrides: not a map by layer name: {overrides!r}")
    patterns = {pattern: _compile(pattern) for pattern in overrides}
    for pattern, changes in overrides.items():
        if not isinstance(changes, Mapping) or changes.keys() - OVERRIDE_KEYS:
            raise InputError(f"overrides: {pattern}: takes a map of {', '.join(sorted(OVERRIDE_KEYS))}")
        if not any(patterns[pattern].fullmatch(layer) for layer in layers):
            raise InputError(f"overrides: {pattern} matches no layer of {', '.join(layers)}")

    return {layer: default.override(changes_of(layer, overrides)) for layer in layers}


def changes_of(layer: str, overrides: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the changes of the first override whose pattern matches a layer's name; an empty map if none does."""
    return next((changes for pattern, changes in overrides.items() if re.fullmatch(pattern, layer)), {})


def _compile(pattern: object) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"overrides: {pattern!r} is not a regular expression: {error}") from error
