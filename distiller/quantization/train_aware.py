"""Quantization-aware training: a forward that rounds as integers would, a backward that does not see it.

Weights stay float parameters that the optimizer updates; every forward uses what they round to. Gradients pass
the rounding unchanged (the straight-through estimator, Bengio et al., arXiv:1308.3432) and stop where a value is
clamped (Jacob et al., arXiv:1712.05877, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.graph import leaf_modules
from distiller.modules import Concat, EltwiseMult
from distiller.quantization.clipping import ClipMode
from distiller.quantization.linear import LinearQuantMode, QuantParams, fake_quantize, params_of_range
from distiller.quantization.settings import Request, modes, requests_by_layer
from distiller.quantization.wrappers import WeightSettings, by_row
from distiller.system.cli import InputError

ACTIVATIONS = (nn.ReLU, Concat, EltwiseMult)  # beside Linear, whose output is quantized too
DEFAULT_EMA_DECAY = 0.999  # a range follows some 1000 batches, an epoch of a small set


def straight_through(x: Tensor, params: QuantParams) -> Tensor:
    """``fake_quantize`` with the gradient of the identity."""
    value = x.detach()
    return x + (fake_quantize(value, params) - value)


class TrackedRange(nn.Module):
    """The moving range of a tensor: exponential averages of its batches' min and max, bias corrected.

    e = d e + (1 - d) v and tracked = e / (1 - d^t), as Adam's moments (Kingma and Ba, section 3). It moves in
    training mode only; before its first batch it leaves tensors as they are.

    Args:
        bits: Of the quantized tensor.
        mode: Of quantization.
        decay: d.
    """

    def __init__(self, bits: int, mode: LinearQuantMode, decay: float):
        super().__init__()
        self.bits, self.mode, self.decay = bits, mode, decay
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the range and rounded to its levels."""
        if self.training:
            low, high = torch.aminmax(x.detach())
            self.low.lerp_(low, 1 - self.decay)
            self.high.lerp_(high, 1 - self.decay)
            self.batches += 1
        elif not self.batches:
            return x
        low, high = self.bounds()
        clamped = torch.clamp(x, low, high)
        return straight_through(clamped, params_of_range(low, high, self.bits, self.mode))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The range as it stands, (1,) float32 each; NaN before the first batch."""
        correction = 1 - self.decay ** self.batches.double()
        low, high = (bound / correction.float() for bound in (self.low, self.high))
        if self.mode.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        return low, high


class RoundedLinear(nn.Linear):
    """``nn.Linear`` that computes with its rounded weights, and quantizes its output where asked.

    It takes over the parameters of ``linear``, so that an optimizer and a checkpoint see no difference.
    """

    def __init__(
        self, linear: nn.Linear, weights: WeightSettings | None, bits_bias: int | None, output: nn.Module
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weights, self.bits_bias = weights, bits_bias
        self.range = output

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.weights:
            weight = straight_through(weight, by_row(self.weights.params(weight)))
        return self.range(F.linear(x, weight, self.rounded_bias()))

    def rounded_bias(self) -> Tensor | None:
        """(M,) the bias as it is computed with."""
        if self.bias is None or not self.bits_bias:
            return self.bias
        reach = self.bias.detach().abs().max().reshape(1)
        params = params_of_range(-reach, reach, self.bits_bias, LinearQuantMode.SYMMETRIC)
        return straight_through(self.bias, params)


class RoundedEmbedding(nn.Module):
    """``nn.Embedding`` that hands out rounded rows. It takes over the table of ``embedding``."""

    def __init__(self, embedding: nn.Embedding, weights: WeightSettings):
        super().__init__()
        self.weight = embedding.weight
        self.weights = replace(weights, per_channel=False)

    def forward(self, index: Tensor) -> Tensor:
        # Rounding the rows handed out is rounding the table, at the cost of a batch.
        return straight_through(F.embedding(index, self.weight), self.weights.params(self.weight))


class RoundedOutput(nn.Module):
    """A module without weights whose output is quantized."""

    def __init__(self, module: nn.Module, output: TrackedRange):
        super().__init__()
        self.module = module
        self.range = output

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.range(self.module(*inputs))


class NCFQuantAwareTrainQuantizer:
    """Prepares a NeuMF for quantization-aware training.

    Args:
        model: In float; changed in place by ``prepare_model``.
        bits_activations: 1 .. 16; 0 or None leaves outputs in float.
        bits_weights: Likewise for weights of Linear and Embedding; an embedding's table has one range.
        bits_bias: Likewise for biases, up to 32, symmetric over the whole bias.
        mode: A ``LinearQuantMode``, its name, or a map of both ``activations`` and ``weights``.
        ema_decay: Of the tracked ranges, in (0, 1).
        per_channel_wts: One range per output feature of a Linear.
        overrides: By a regular expression of whole layer names, changes to ``bits_activations``,
            ``bits_weights`` or ``mode``. The first that matches counts.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        bits_activations: int | None = 8,
        bits_weights: int | None = 8,
        bits_bias: int | None = 32,
        mode: LinearQuantMode | str | Mapping[str, Any] = LinearQuantMode.SYMMETRIC,
        ema_decay: float = DEFAULT_EMA_DECAY,
        per_channel_wts: bool = False,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if not isinstance(ema_decay, float) or not 0 < ema_decay < 1:
            raise InputError(f"ema_decay: {ema_decay!r} is not between 0 and 1")
        if not isinstance(per_channel_wts, bool):
            raise InputError(f"per_channel_wts: {per_channel_wts!r} is neither true nor false")
        if bits_bias is not None and (type(bits_bias) is not int or not 0 <= bits_bias <= 32):
            raise InputError(f"bits_bias: {bits_bias!r}; it takes 1 to 32 bits, or 0 for float")
        self.model = model
        self.default = Request(
            bits_activations, bits_weights, 32, *modes(mode), ClipMode.NONE, None, per_channel_wts, None
        )
        self.bits_bias = bits_bias
        self.ema_decay = ema_decay
        self.overrides = overrides or {}

    def prepare_model(self) -> None:
        """Replace the model's layers by ones that round. Its parameters stay the same objects, by the same names.

        Raises:
            InputError: a layer's settings are out of range.
        """
        leaves = leaf_modules(self.model)
        for name, request in requests_by_layer(self.default, self.overrides, leaves).items():
            replacement = self._rounded(name, leaves[name], request)
            if replacement is not None:
                self.model.set_submodule(name, replacement.to(next(self.model.parameters()).device))

    def _rounded(self, name: str, module: nn.Module, request: Request) -> nn.Module | None:
        activations, weights = request.activations(name), request.weights(name)
        output = (
            TrackedRange(activations.bits, activations.mode, self.ema_decay) if activations else nn.Identity()
        )
        if isinstance(module, nn.Linear):
            return RoundedLinear(module, weights, self.bits_bias, output)
        if isinstance(module, nn.Embedding) and weights:
            return RoundedEmbedding(module, weights)
        if isinstance(module, ACTIVATIONS) and activations:
            return RoundedOutput(module, output)
        return None


def is_quantization_aware(model: nn.Module) -> bool:
    """Whether a model has been prepared for quantization-aware training."""
    return any(
        isinstance(module, RoundedLinear | RoundedEmbedding | RoundedOutput) for module in model.modules()
    )


def without_ranges(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float model's part of a quantization-aware model's weights."""
    return {key: tensor for key, tensor in state_dict.items() if ".range." not in key}
