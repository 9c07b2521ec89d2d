"""Calibrated statistics of activations: the YAML file, and what fusing and clipping make of them.

A file has an entry per leaf module: ``inputs``, by position, and ``output``, each a map of min, max, avg_min,
avg_max, mean, std, b, shape and, of floating point values, column_max (a text of numbers) and histogram.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from distiller.graph import ModuleCall
from distiller.quantization.histogram import Histogram
from distiller.system.cli import InputError
from distiller.system.files import atomic_write
from distiller.untrusted.yaml import read_yaml

Statistics = dict[str, dict[str, Any]]

NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
# What the consumer makes irrelevant: a ReLU negative values, the others what they saturate.
ACTIVATION_BOUNDS = {nn.ReLU: (0.0, math.inf), nn.Sigmoid: (-6.0, 6.0), nn.Tanh: (-4.0, 4.0)}
FLOAT32_MAX = torch.finfo(torch.float32).max
FLAG = "--qe-stats-file"
# A table's largest weight may be this many times its largest calibrated one before a warning. A model of ml-1m,
# calibrated on a tenth of its users, had 2.03 in mf_user_embed.
FOREIGN_FACTOR = 4.0


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read a statistics file, with the safe YAML loader.

    Raises:
        InputError: not YAML, or not of this form; the message names file and layer.
        OSError: it cannot be read.
    """
    content = read_yaml(path, FLAG)
    check_statistics(content, path)
    return content


def check_statistics(content: object, where: object) -> None:
    """Raise an ``InputError`` that names ``where`` and the layer unless ``content`` has a statistics file's form."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"{FLAG}: {where}: no map of layers")
    for layer, entry in content.items():
        problem = _problem(entry) if isinstance(layer, str) else "not a layer's name"
        if problem:
            raise InputError(f"{FLAG}: {where}: {layer}: {problem}")


def _problem(entry: object) -> str | None:
    """What is wrong with a layer's entry, if anything."""
    if not isinstance(entry, dict) or not isinstance(entry.get("inputs", {}), dict):
        return "not a map of inputs and output"
    tensors = {f"inputs: {i}": tensor for i, tensor in entry.get("inputs", {}).items()}
    for name, tensor in (tensors | {"output": entry.get("output", {})}).items():
        if not isinstance(tensor, dict):
            return f"{name}: not a map of statistics"
        for key in NUMBERS:
            value = tensor.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
                return f"{name}: {key}: {str(value)[:40]} is not a number that float32 holds"
        for key, read in (("histogram", Histogram.from_plain), ("column_max", columns_of_text)):
            try:
                if key in tensor:
                    read(tensor[key])
            except ValueError as error:
                return f"{name}: {key}: {error}"
    return None


def text_of_columns(values: Tensor) -> str:
    """(C,) float32 as a text that ``columns_of_text`` reads back without loss."""
    return " ".join(f"{value:.9g}" for value in values.tolist())


def columns_of_text(text: object) -> Tensor:
    """(C,) float32 from a text of C numbers.

    Raises:
        ValueError: it is none.
    """
    try:
        values = torch.tensor([float(number) for number in str(text).split()])
    except ValueError as error:
        raise ValueError(f"not all numbers: {error}") from error
    if not len(values) or not values.isfinite().all():
        raise ValueError("not all numbers that float32 holds")
    return values


def save_statistics(statistics: Statistics, path: str | os.PathLike, comment: str = "") -> None:
    """Write a statistics file in block style, ``comment``'s lines at its top.

    Raises:
        InputError: it could not be read back: a number is not finite.
    """
    check_statistics(statistics, path)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    with atomic_write(path) as temporary:
        temporary.write_text(head + yaml.safe_dump(statistics, sort_keys=False, default_flow_style=False))


def tensor_statistics(
    statistics: Statistics, layer: str, position: int | None, keys: tuple[str, ...]
) -> dict:
    """The statistics of a layer's input ``position``, or of its output where that is None.

    Raises:
        InputError: the layer, the tensor or one of ``keys`` is missing.
    """
    if layer not in statistics:
        raise InputError(f"{FLAG}: no statistics for layer {layer}")
    entry = statistics[layer]
    name = "output" if position is None else f"input {position}"
    tensor = entry.get("output") if position is None else _input(entry, position)
    if tensor is None:
        raise InputError(f"{FLAG}: layer {layer} has no statistics of its {name}")
    for key in keys:
        if key not in tensor:
            raise InputError(f"{FLAG}: layer {layer}: its {name} has no {key}, which these settings need")
    return tensor


def _input(entry: Mapping[str, Any], position: int) -> dict | None:
    inputs = entry.get("inputs", {})
    return inputs.get(position, inputs.get(str(position)))


def clip_to_consumers(statistics: Statistics, bounds: Mapping[str, tuple[str, float, float]]) -> Statistics:
    """Statistics in which outputs are cut to what their consumer keeps; the argument is left alone.

    Args:
        statistics: Of the whole model.
        bounds: By producer's name: its only consumer's name, and the bounds that consumer keeps.

    Returns:
        A copy. min, max, avg_min, avg_max and the histogram of each producer's output lie within the bounds, and
        the consumer's input 0 is a copy of it.
    """
    result = copy.deepcopy(statistics)
    for producer, (consumer, low, high) in bounds.items():
        output = tensor_statistics(result, producer, None, ())
        for key in ("min", "max", "avg_min", "avg_max"):
            if key in output:
                output[key] = min(max(output[key], low), high)
        if "histogram" in output:
            output["histogram"] = Histogram.from_plain(output["histogram"]).within(low, high).plain()
        if consumer in result:
            result[consumer].setdefault("inputs", {})[0] = dict(output)
    return result


def consumer_bounds(
    graph: Mapping[str, ModuleCall], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[str, float, float]]:
    """By name, the modules whose one consumer is a ReLU, a sigmoid or a tanh, with it and what it keeps."""
    result = {}
    for name, call in graph.items():
        consumer = call.consumers[0] if len(call.consumers) == 1 else None
        if call.calls == 1 and consumer is not None and graph[consumer].calls == 1:
            bounds = ACTIVATION_BOUNDS.get(type(modules[consumer]))
            if bounds:
                result[name] = (consumer, *bounds)
    return result


def foreign_statistics(model: nn.Module, statistics: Statistics) -> str | None:
    """Why statistics plainly belong to another model, if they do: a shape that differs, or a table out of range.

    A model's own tables can exceed their calibrated range somewhat, since calibration sees a share of the users.
    """
    for name, module in model.named_modules():
        output = statistics.get(name, {}).get("output", {})
        width = getattr(module, "out_features", getattr(module, "embedding_dim", None))
        shape = re.fullmatch(r"\(\d+, (\d+)\)", str(output.get("shape", "")))
        if width is not None and shape and int(shape[1]) != width:
            return f"{name} has outputs of width {shape[1]} there and {width} here"
        if isinstance(module, nn.Embedding) and output.keys() >= {"min", "max"}:
            calibrated = max(abs(output["min"]), abs(output["max"]))
            largest = module.weight.detach().abs().max().item()
            if largest > FOREIGN_FACTOR * calibrated:
                return f"{name} reaches {calibrated:.3g} there and {largest:.3g} here"
    return None
