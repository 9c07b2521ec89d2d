"""What is asked of every layer: defaults, then the first override whose pattern is the layer's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from distiller.quantization.clipping import ACIQ_ALPHA, ACIQ_MAX_BITS, ClipMode
from distiller.quantization.linear import LinearQuantMode
from distiller.quantization.statistics import FLOAT32_MAX
from distiller.quantization.wrappers import ActivationSettings, WeightSettings
from distiller.system.cli import InputError

MAX_BITS = 16
OVERRIDE_KEYS = {"bits_activations", "bits_weights", "clip_acts", "clip_n_stds", "mode"}

Choice = TypeVar("Choice", bound=Enum)


@dataclass(frozen=True)
class Request:
    """Settings as a user gives them, of the whole model or, with an override's changes, of one layer.

    Attributes:
        bits_activations: 1 .. 16; 0 or None leaves activations in float.
        bits_weights: Likewise for weights.
        bits_accum: Of Linear's accumulator, 1 .. 32.
        mode_activations: Quantization mode.
        mode_weights: Likewise.
        clip_acts: How activations' ranges are found.
        clip_n_stds: For ``ClipMode.N_STD``, above 0.
        per_channel_wts: A scale per output feature of a Linear.
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
        """These settings with an override's changes."""
        values = dict(vars(self))
        for key, value in changes.items():
            if key == "mode":
                values["mode_activations"], values["mode_weights"] = modes(value)
            else:
                values[key] = choice(ClipMode, value, key) if key == "clip_acts" else value
        return Request(**values)

    def activations(self, layer: str) -> ActivationSettings | None:
        """How the layer's activations are quantized; None for not at all.

        Raises:
            InputError: naming flag and layer.
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
        """How the layer's weights are quantized; None for not at all.

        Raises:
            InputError: naming flag and layer.
        """
        bits = _bits(self.bits_weights, "--qe-bits-wts (bits_parameters, bits_weights)", layer)
        if not bits:
            return None
        _check_levels(self.mode_weights, bits, layer)
        return WeightSettings(bits, self.mode_weights, self.per_channel_wts, self.bits_accum)


def _bits(bits: int | None, flag: str, layer: str) -> int:
    if bits is None or (type(bits) is int and 0 <= bits <= MAX_BITS):
        return bits or 0
    raise InputError(f"{flag}: {bits!r} for layer {layer}; it takes 1 to {MAX_BITS} bits, or 0 for float")


def _check_levels(mode: LinearQuantMode, bits: int, layer: str) -> None:
    if mode is LinearQuantMode.SYMMETRIC_RESTRICTED and bits == 1:
        raise InputError(f"--qe-mode: {mode.value} with 1 bit for layer {layer} has no level but 0")


def _check_clip(clip: ClipMode, n_stds: float | None, bits: int, layer: str) -> None:
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
    """A member of an enumeration from itself, its value or its name in any case.

    Raises:
        InputError: none of them, naming ``what``.
    """
    if isinstance(value, kind):
        return value
    for member in kind:
        if isinstance(value, str) and value.lower() in (member.value, member.name.lower()):
            return member
    raise InputError(f"{what}: {value!r} is none of {', '.join(member.value for member in kind)}")


def modes(value: object) -> tuple[LinearQuantMode, LinearQuantMode]:
    """Modes of activations and of weights, from one mode or a map of both.

    Raises:
        InputError: neither.
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
    """Every layer's settings.

    Args:
        default: Of a layer that no override names.
        overrides: By a regular expression of whole layer names; the first that matches counts.
        layers: Names.

    Raises:
        InputError: a pattern that matches no layer or is none, or a key that no override has.
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
    """What the first override whose pattern is the layer's name changes; nothing where there is none."""
    return next((changes for pattern, changes in overrides.items() if re.fullmatch(pattern, layer)), {})


def _compile(pattern: object) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"overrides: {pattern!r} is not a regular expression: {error}") from error
