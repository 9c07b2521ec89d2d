"""Quantization-aware training: the forward pass rounds as integers would, the backward pass ignores that.

Weights stay float parameters that the optimizer updates; every forward computes with their rounded values. Gradients
pass through the rounding unchanged (the straight-through estimator, Bengio et al., arXiv:1308.3432) and are 0 where a
value is clamped (Jacob et al., arXiv:1712.05877, section 3).

Shapes: M output features.
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
from distiller.quantization.settings import Request, WeightSettings, modes, requests_by_layer
from distiller.quantization.wrappers import by_row
from distiller.system.cli import InputError

ACTIVATIONS = (nn.ReLU, Concat, EltwiseMult)  # The modules without weights whose outputs are quantized.
DEFAULT_EMA_DECAY = 0.999  # A range then follows some 1000 batches, which is an epoch of a small data set.


def straight_through(x: Tensor, params: QuantParams) -> Tensor:
    """Return ``x`` quantized and dequantized, with the gradient of the identity."""
    value = x.detach()
    return x + (fake_quantize(value, params) - value)


class TrackedRange(nn.Module):
    """The moving range of a tensor: exponential moving averages of the batches' min and max, with bias correction.

    With v the min or the max of batch t, e = d e + (1 - d) v and tracked = e / (1 - d^t), like Adam's moments (Kingma
    and Ba, arXiv:1412.6980, section 3). The range moves in training mode only. Before its first batch, evaluation
    leaves tensors as they are.

    Args:
        bits: The width of the integers.
        mode: How the range is mapped to integers.
        decay: The decay d of the averages.
    """

    def __init__(self, bits: int, mode: LinearQuantMode, decay: float):
        super().__init__()
        self.bits, self.mode, self.decay = bits, mode, decay
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` clamped to the range and rounded to its levels; in training mode, move the range first."""
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
        """Return the lower and the upper bound, (1,) float32 each; NaN before the first batch."""
        correction = 1 - self.decay ** self.batches.double()
        low, high = (bound / correction.float() for bound in (self.low, self.high))
        if self.mode.symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        return low, high


class RoundedLinear(nn.Linear):
    """An ``nn.Linear`` that computes with rounded weights and a rounded bias, and quantizes its output.

    It takes over the parameters of ``linear``, so that an optimizer and a checkpoint see no difference.

    Args:
        linear: The float layer.
        weights: How the weights are rounded; None to leave them in float.
        bits_bias: Bits of the bias; 0 or None to leave it in float.
        output: What quantizes the output: a ``TrackedRange``, or ``nn.Identity`` to leave it in float.
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
        """Return the layer's quantized output."""
        weight = self.weight
        if self.weights:
            weight = straight_through(weight, by_row(self.weights.params(weight)))
        return self.range(F.linear(x, weight, self.rounded_bias()))

    def rounded_bias(self) -> Tensor | None:
        """Return the bias that the layer computes with, (M,); None where it has none."""
        if self.bias is None or not self.bits_bias:
            return self.bias
        reach = self.bias.detach().abs().max().reshape(1)
        params = params_of_range(-reach, reach, self.bits_bias, LinearQuantMode.SYMMETRIC)
        return straight_through(self.bias, params)


class RoundedEmbedding(nn.Module):
    """An ``nn.Embedding`` whose rows are rounded. It takes over the table of ``embedding`` as its parameter."""

    def __init__(self, embedding: nn.Embedding, weights: WeightSettings):
        super().__init__()
        self.weight = embedding.weight
        self.weights = replace(weights, per_channel=False)

    def forward(self, index: Tensor) -> Tensor:
        """Return the rounded rows at ``index``."""
        # Rounding the rows that were read gives what rounding the whole table gives, at the cost of one batch.
        return straight_through(F.embedding(index, self.weight), self.weights.params(self.weight))


class RoundedOutput(nn.Module):
    """A module without weights, followed by the quantization of its output."""

    def __init__(self, module: nn.Module, output: TrackedRange):
        super().__init__()
        self.module = module
        self.range = output

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the module's quantized output."""
        return self.range(self.module(*inputs))


class NCFQuantAwareTrainQuantizer:
    """A quantizer that prepares a NeuMF for quantization-aware training.

    Args:
        model: The float model, which ``prepare_model`` changes in place.
        bits_activations: Bits of outputs, 1 .. 16; 0 or None leaves them in float.
        bits_weights: Bits of weights of Linear and Embedding, 1 .. 16; 0 or None leaves them in float. An embedding
            table has one range.
        bits_bias: Bits of biases, 1 .. 32, symmetric over the whole bias; 0 or None leaves them in float.
        mode: A ``LinearQuantMode``, its name, or a map of both ``activations`` and ``weights``.
        ema_decay: The decay of the tracked ranges, in (0, 1).
        per_channel_wts: Whether every output feature of a Linear has a range of its own for its weights.
        overrides: By a regular expression that matches whole layer names, changes to ``bits_activations``,
            ``bits_weights`` or ``mode``. The first expression that matches counts.

    Raises:
        InputError: an argument is out of its range.
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
        """Replace the model's layers by ones that round. Its parameters stay the same objects under the same names.

        Raises:
            InputError: a layer's settings are out of range.
        """
        leaves = leaf_modules(self.model)
        for name, request in requests_by_layer(self.default, self.overrides, leaves).items():
            replacement = self._rounded(name, leaves[name], request)
            if replacement is not None:
                self.model.set_submodule(name, replacement.to(next(self.model.parameters()).device))

    def _rounded(self, name: str, module: nn.Module, request: Request) -> nn.Module | None:
        """Return the form of a module that rounds; None where the module stays as it is."""
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
    """Return whether a model has been prepared for quantization-aware training."""
    return any(
        isinstance(module, RoundedLinear | RoundedEmbedding | RoundedOutput) for module in model.modules()
    )


def without_ranges(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a quantization-aware model's state without its tracked ranges: that of the float model."""
    return {key: tensor for key, tensor in state_dict.items() if ".range." not in key}
