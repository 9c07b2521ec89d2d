"""From quantization-aware training to integers: the post-training quantizer that rounds as training did."""

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
    """Return the quantizer that prepares a float model with the bits, modes and ranges of a quantization-aware one.

    The model that it prepares computes what ``aware`` computes in evaluation mode, with these differences: sums are
    exact and not rounded to float32, and biases are rounded to units of these sums, so that a value about halfway
    between two levels may be rounded to the other one; and a range on one side of 0 is widened to contain 0.

    Args:
        aware: A model prepared by ``NCFQuantAwareTrainQuantizer`` and trained.
        model: The float model with the same weights. Its biases are rounded in place, as in training.

    Raises:
        InputError: a range of ``aware`` has not seen a batch yet.
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
    """Return the bits and modes of a layer as an override; what the layer does not round stays in float."""
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
    """Return the range of a layer as its entry in the statistics.

    It is that of an embedding's table, else the tracked one of the layer's output; the entry is empty where there is
    neither.
    """
    if isinstance(rounded, RoundedEmbedding):
        low, high = rounded.weight.detach().aminmax()
    elif isinstance(getattr(rounded, "range", None), TrackedRange):
        if not rounded.range.batches:
            raise InputError(f"layer {name} has no range: it was not trained with quantization yet")
        low, high = rounded.range.bounds()
    else:
        return {}
    return {"output": {"min": low.item(), "max": high.item()}}
