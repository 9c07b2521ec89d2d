"""Calibrated statistics of activations: their YAML file, and how they are clipped to what a consumer keeps.

A file has an entry for every leaf module, with the statistics of its ``inputs``, by position, and of its ``output``.
Those of a tensor are a map of min, max, avg_min, avg_max, mean, std, b, shape and, for floating point values,
column_max (a text of numbers) and histogram.

Shapes: C columns.
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
# By consumer, the bounds outside of which its input makes next to no difference: a ReLU turns negative values into 0,
# and the others saturate.
ACTIVATION_BOUNDS = {nn.ReLU: (0.0, math.inf), nn.Sigmoid: (-6.0, 6.0), nn.Tanh: (-4.0, 4.0)}
FLOAT32_MAX = torch.finfo(torch.float32).max
FLAG = "--qe-stats-file"
# A warning is due when a table's largest weight is more than this many times its largest calibrated one. In a model of
# ml-1m that was calibrated on a tenth of the users, mf_user_embed reached 2.03 times.
FOREIGN_FACTOR = 4.0


def load_statistics(path: str | os.PathLike) -> Statistics:
    """Return the content of a statistics file, which is read with the safe YAML loader.

    Raises:
        InputError: the file is not YAML or does not have the form of a statistics file; the message names the file
            and the layer.
        OSError: the file cannot be read.
    """
    content = read_yaml(path, FLAG)
    check_statistics(content, path)
    return content


def check_statistics(content: object, where: object) -> None:
    """Raise an ``InputError`` unless ``content`` has the form of a statistics file.

    The message names ``where``, which is the file or the argument, and the layer.
    """
    if not isinstance(content, dict) or not content:
        raise InputError(f"{FLAG}: {where}: no map of layers")
    for layer, entry in content.items():
        problem = _problem(entry) if isinstance(layer, str) else "not a layer's name"
        if problem:
            raise InputError(f"{FLAG}: {where}: {layer}: {problem}")


def _problem(entry: object) -> str | None:
    """Return what is wrong with the entry of a layer; None if nothing is."""
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
    """Return (C,) float32 values as a text that ``columns_of_text`` reads back without loss."""
    return " ".join(f"{value:.9g}" for value in values.tolist())


def columns_of_text(text: object) -> Tensor:
    """Return the C numbers of a text as (C,) float32.

    Raises:
        ValueError: the value is not a text of finite numbers, or an empty one.
    """
    try:
        values = torch.tensor([float(number) for number in str(text).split()])
    except ValueError as error:
        raise ValueError(f"not all numbers: {error}") from error
    if not len(values) or not values.isfinite().all():
        raise ValueError("not all numbers that float32 holds")
    return values


def save_statistics(statistics: Statistics, path: str | os.PathLike, comment: str = "") -> None:
    """Write a statistics file in block style.

    Args:
        statistics: The statistics of a model.
        path: The file to write.
        comment: Lines to put at the top of the file, as YAML comments.

    Raises:
        InputError: the file could not be read back, because a number is not finite.
    """
    check_statistics(statistics, path)
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    with atomic_write(path) as temporary:
        temporary.write_text(head + yaml.safe_dump(statistics, sort_keys=False, default_flow_style=False))


def tensor_statistics(
    statistics: Statistics, layer: str, position: int | None, keys: tuple[str, ...]
) -> dict:
    """Return the statistics of one tensor of a layer.

    Args:
        statistics: The statistics of the whole model.
        layer: The layer's name.
        position: The position of one of the layer's inputs; None for its output.
        keys: The statistics that must be there.

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
    """Return a copy of the statistics in which outputs are clipped to what their consumers keep.

    Args:
        statistics: The statistics of the whole model, which are left unchanged.
        bounds: By the producer's name, the name of its only consumer and the bounds that this consumer keeps.

    Returns:
        The copy. min, max, avg_min, avg_max and the histogram of each producer's output lie within the bounds, and
        the statistics of the consumer's input 0 are the same.
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
    """Return the modules whose only consumer is a ReLU, a sigmoid or a tanh.

    Args:
        graph: The places of the modules in the model's graph, by name.
        modules: The modules, by the same names.

    Returns:
        By the module's name, the consumer's name and the bounds that it keeps.
    """
    result = {}
    for name, call in graph.items():
        consumer = call.consumers[0] if len(call.consumers) == 1 else None
        if call.calls == 1 and consumer is not None and graph[consumer].calls == 1:
            bounds = ACTIVATION_BOUNDS.get(type(modules[consumer]))
            if bounds:
                result[name] = (consumer, *bounds)
    return result


def foreign_statistics(model: nn.Module, statistics: Statistics) -> str | None:
    """Return why statistics plainly belong to another model; None where they may belong to this one.

    A layer's outputs have another width, or an embedding table reaches far beyond its calibrated range. A model's own
    tables may exceed that range somewhat, since calibration sees only a share of the users.
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
