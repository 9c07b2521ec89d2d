"""From quantization-aware training to integers: the post-training quantizer that does what training rehearsed."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from distiller.graph import leaf_modules
from distiller.quantization.linear import LinearQuantMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.statistics import Statistics
from distiller.quantization.train_aware import RoundedEmbedding, RoundedLinear, TrackedRange
from distiller.system.cli import InputError


def quantizer_of_aware(aware: nn.Module, model: nn.Module) -> PostTrainLinearQuantizer:
    """The quantizer that prepares a float model with the bits, modes and ranges of a quantization-aware one.

    What it prepares computes what ``aware`` does in evaluation mode, but for sums that are exact in place of rounded to
    float32, and biases that are rounded to units of these: a value between two levels may come to lie on the other one.
    And a range on one side of 0 is widened to contain it.

    Args:
        aware: Prepared by ``NCFQuantAwareTrainQuantizer`` and trained.
        model: The float model with the same weights. Its biases are rounded here as in training.

    Raises:
        InputError: a range has not seen a batch yet.
    """
    overrides: dict[str, dict[str, Any]] = {}
    statistics: Statistics = {}
    per_channel = False
    for name, module in leaf_modules(model).items():
        rounded = aware.get_submodule(name)
        overrides[re.escape(name)] = _settings(rounded)
        statistics[name] = _range(name, rounded)
        if isinstance(rounded, RoundedLinear):
            per_channel |= bool(rounded.weights and rounded.weights.per_channel)
            if rounded.bias is not None:
                module.bias.data = rounded.rounded_bias().detach()
    return PostTrainLinearQuantizer(
        model,
        overrides=overrides,
        per_channel_wts=per_channel,
        model_activation_stats=statistics,
        fuse_relu=False,
    )


def _settings(rounded: nn.Module) -> dict[str, Any]:
    """A layer's bits and modes, as an override; float on both counts where it does not round."""
    tracked, weights = getattr(rounded, "range", None), getattr(rounded, "weights", None)
    activations = tracked if isinstance(tracked, TrackedRange) else None
    return {
        "bits_activations": activations.bits if activations else None,
        "bits_weights": weights.bits if weights else None,
        "mode": {
            "activations": activations.mode if activations else LinearQuantMode.SYMMETRIC,
            "weights": weights.mode if weights else LinearQuantMode.SYMMETRIC,
        },
    }


def _range(name: str, rounded: nn.Module) -> dict[str, Any]:
    """A layer's range, as statistics: that of its table, or the one tracked of its outputs; empty where it has none."""
    if isinstance(rounded, RoundedEmbedding):
        low, high = rounded.weight.detach().aminmax()
    elif isinstance(getattr(rounded, "range", None), TrackedRange):
        if not rounded.range.batches:
            raise InputError(f"layer {name} has no range: it was not trained with quantization yet")
        low, high = rounded.range.bounds()
    else:
        return {}
    return {"output": {"min": low.item(), "max": high.item()}}
