"""Scales and zero points of a layer's tensors by calibrated statistics; errors name the flag and the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distiller.quantization.clipping import required_statistics
from distiller.quantization.linear import QuantParams, params_of_range
from distiller.quantization.settings import ActivationSettings, WeightSettings
from distiller.quantization.statistics import FLAG, Statistics, columns_of_text, tensor_statistics
from distiller.system.cli import InputError


def params_of_activations(
    statistics: Statistics,
    layer: str,
    position: int | None,
    activations: ActivationSettings,
    half_range: bool = False,
    columns: int | None = None,
) -> QuantParams:
    """Return the parameters of a layer's input or output.

    Args:
        statistics: The statistics of the whole model.
        layer: The layer's name.
        position: The position of the input; None for the output.
        activations: How the tensor is quantized.
        half_range: Whether the tensor is the output of a fused ReLU.
        columns: C, the number of columns of a ReLU's output of which each gets a scale of its own; None for one scale.

    Returns:
        (C,) parameters, or (1,) without ``columns``.

    Raises:
        InputError: statistics that the settings need are missing, or cannot be used.
    """
    keys = required_statistics(activations.clip, activations.mode.symmetric)
    by_column = columns is not None
    tensor = tensor_statistics(statistics, layer, position, (*keys, "column_max") if by_column else keys)
    with _statistics_of(layer):
        column_max = columns_of_text(tensor["column_max"]) if by_column else None
        if by_column and len(column_max) != columns:
            raise ValueError(f"column_max of {len(column_max)} columns, not {columns}")
        return activations.params(tensor, half_range, column_max)


def params_of_table(
    statistics: Statistics | None, layer: str, embedding: nn.Embedding, weights: WeightSettings
) -> QuantParams:
    """Return the (1,) parameters of an embedding table.

    Args:
        statistics: The statistics of the whole model: the range is that of the layer's calibrated outputs. None: the
            range is that of the table itself.
        layer: The layer's name.
        embedding: The layer, in float.
        weights: How the table is quantized.

    Raises:
        InputError: the statistics of the outputs are missing, or cannot be used.
    """
    if statistics is None:
        low, high = embedding.weight.detach().aminmax()
    else:
        output = tensor_statistics(statistics, layer, None, ("min", "max"))
        low, high = torch.tensor([output["min"]]), torch.tensor([output["max"]])
    with _statistics_of(layer):
        return params_of_range(low.reshape(1), high.reshape(1), weights.bits, weights.mode)


@contextmanager
def _statistics_of(layer: str) -> Iterator[None]:
    """Turn a ``ValueError`` about a range that cannot be quantized into an error that names the layer."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{FLAG}: layer {layer}: {error}") from error
