"""Quantized models as plain values: integers, scales and settings, enough to restore them without float weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.statistics import FLAG, Statistics, columns_of_text, text_of_columns
from distiller.quantization.wrappers import QuantizedTable
from distiller.system.cli import InputError
from distiller.system.files import atomic_write


def content_of(quantizer: PostTrainLinearQuantizer) -> dict[str, Any]:
    """Return what ``restore`` needs to make a prepared model again: a map of tensors, texts and numbers."""
    return {
        "state_dict": quantizer.model.state_dict(),
        "statistics": _without_distributions(quantizer.statistics),
        "quantizer": _plain(quantizer.arguments()),
    }


def restore(model: nn.Module, content: Mapping[str, Any], dummy_input: Any) -> PostTrainLinearQuantizer:
    """Return the quantizer of a saved model, with the model prepared as it was.

    Args:
        model: A float model of the same structure, changed in place. Its weights do not matter: they are replaced.
        content: What ``content_of`` returned.
        dummy_input: Arguments of the model's forward, for tracing it.

    Raises:
        InputError: the parts of the content do not fit each other, or hold what no quantized model has.
    """
    try:
        statistics = content["statistics"]
        if isinstance(statistics, str) or not _is_plain(statistics):
            raise TypeError("its statistics are not a map of numbers")
        quantizer = PostTrainLinearQuantizer(model, model_activation_stats=statistics, **content["quantizer"])
        quantizer.prepare_model(dummy_input)
        own = {name: (x.dtype, x.shape) for name, x in model.state_dict().items()}
        for name, x in content["state_dict"].items():
            if own.get(name, (x.dtype, x.shape)) != (x.dtype, x.shape):
                raise TypeError(f"{name} is {x.dtype}, {tuple(x.shape)}")
        model.load_state_dict(content["state_dict"])
    except (InputError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).removeprefix(f"{FLAG}: ").split())
        raise InputError(f"not a whole quantized model: {reason}") from error
    check_tensors(model)
    return quantizer


def save_config(
    quantizer: PostTrainLinearQuantizer, statistics: str | os.PathLike, path: str | os.PathLike, **more: Any
) -> None:
    """Write a quantizer's settings as a ``--qe-config-file``.

    Args:
        quantizer: The quantizer whose settings are written.
        statistics: The path of the quantizer's statistics, which the file will refer to.
        path: The file to write.
        more: Further entries of the file, beside ``quantizers``.
    """
    arguments = _plain(quantizer.arguments())
    del arguments["save_fp_weights"]  # It is a flag's: the file may not have it.
    entry = {"class": type(quantizer).__name__} | arguments
    entry["model_activation_stats"] = str(Path(statistics).resolve())
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump({"quantizers": {"chosen": entry}} | more, sort_keys=False))


def check_tensors(model: nn.Module) -> None:
    """Raise an ``InputError`` unless a prepared model's tensors hold only values that preparing can give them.

    Floats must be finite, scales above 0, zero points whole numbers with 0 in the range that they stand for, and the
    weights' integers in their range.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"not a quantized model: {name} holds values that are not finite")
        if name.endswith("scale") and not (tensor > 0).all():
            raise InputError(f"not a quantized model: {name} holds values that are not above 0")
    for name, module in model.named_modules():
        for what, params in getattr(module, "all_params", dict)().items():
            zero_point, low, high = params.zero_point, params.q_min, params.q_max
            if ((zero_point != zero_point.round()) | (zero_point < -high) | (zero_point > -low)).any():
                raise InputError(f"not a quantized model: the zero point of {name}'s {what} is out of range")
            weight = (
                module.integers() if isinstance(module, QuantizedTable) else getattr(module, "weight", None)
            )
            if what == "weight" and ((weight < low) | (weight > high)).any():
                raise InputError(f"not a quantized model: {name} holds weights outside {low} to {high}")


def _without_distributions(statistics: Statistics | None) -> Statistics | None:
    """Return a copy of statistics with histograms of a single bin and columns' maxima of 0.

    A restored model does not need them: the ranges that were found in them are in its tensors.
    """
    result = copy.deepcopy(statistics)
    for entry in (result or {}).values():
        for tensor in (*entry.get("inputs", {}).values(), entry.get("output", {})):
            if "histogram" in tensor:
                tensor["histogram"] |= {"counts": "1"}
            if "column_max" in tensor:
                tensor["column_max"] = text_of_columns(
                    torch.zeros_like(columns_of_text(tensor["column_max"]))
                )
    return result


def _plain(value: object) -> object:
    """Return settings with members of enumerations replaced by their values."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value.value if isinstance(value, Enum) else value


def _is_plain(value: object) -> bool:
    """Return whether a value is made of maps, texts, numbers and None alone."""
    if isinstance(value, Mapping):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return value is None or isinstance(value, str | int | float)
