"""Where a quantized model loses accuracy: tensor by tensor, and layer by layer in HR@k and NDCG@k."""

from __future__ import annotations

import copy
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dataset import Split
from distiller.calibration import TestFunction
from distiller.files import atomic_write
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.analysis import TensorErrors, compare_tensors
from evaluation import Metrics, evaluate
from loading import dummy_input
from neumf import NeuMF
from scoring import PairScorer, Scorer, float_scorer

# The table's columns: heading, and width.
COLUMNS = (
    ("layer", -14),
    ("tensor", -7),
    ("min", 9),
    ("max", 9),
    ("from", 9),
    ("to", 9),
    ("scale", 9),
    ("zero pt", 7),
    ("used", 6),
    ("beyond", 6),
    ("SQNR", 6),
)
LEGEND = (
    "min, max: of the float model. from, to: what the integers stand for, at so many quanta per unit (scale).",
    "used: integers that occur, %. beyond: float values out of reach, %. SQNR: dB. HR, NDCG: that layer alone.",
)


@dataclass(frozen=True)
class Losses:
    """What quantization costs.

    Attributes:
        nb_users: The metrics' users, the first so many.
        in_float: What the float model ranks them at.
        quantized: What the quantized model does.
        alone: What the float model does with one layer quantized, by that layer's name.
        tensors: Of the quantized layers, a layer's one after the other.
    """

    nb_users: int
    in_float: Metrics
    quantized: Metrics
    alone: dict[str, Metrics]
    tensors: list[TensorErrors]


def measure_losses(
    model: NeuMF,
    quantizer: PostTrainLinearQuantizer,
    test_fn: TestFunction,
    split: Split,
    nb_users: int,
    k: int,
    device: torch.device,
) -> Losses:
    """Measure what quantization costs, simulated in floats.

    Args:
        model: In float, on ``device``.
        quantizer: Prepared, of a copy of ``model``.
        test_fn: Makes a model see the data that tensors are compared on.
        split: Users and candidates of the metrics.
        nb_users: The first so many.
        k: Of HR@k and NDCG@k.
        device: The models'.
    """

    def metrics(scorer: Scorer) -> Metrics:
        return evaluate(scorer, split, k, device, nb_users=nb_users)

    tensors = compare_tensors(model, quantizer, test_fn, split.nb_candidates)
    alone = {}
    for layer in quantizer.describe():
        one = quantizer.of_one_layer(copy.deepcopy(model), layer)
        one.prepare_model(dummy_input(device))
        alone[layer] = metrics(simulated(one))
    return Losses(nb_users, metrics(float_scorer(model)), metrics(simulated(quantizer)), alone, tensors)


def simulated(quantizer: PostTrainLinearQuantizer) -> Scorer:
    """What scores with a prepared model in floats."""
    return PairScorer(quantizer.model, one_user=quantizer.dynamic)


def table(losses: Losses) -> str:
    """Lines of up to 120 characters: the metrics of both models, then a row for every tensor."""
    k = losses.in_float.k
    columns = (*COLUMNS, (f"HR@{k}", 6), (f"NDCG@{k}", 7))
    lines = [
        f"Float model, {losses.nb_users} users: {losses.in_float}",
        f"Quantized model, the same users: {losses.quantized}",
        *LEGEND,
        _line([heading for heading, _ in columns], columns),
    ]
    layer = None
    for tensor in losses.tensors:
        lines.append(_line(_cells(tensor, losses.alone[tensor.layer], tensor.layer != layer), columns))
        layer = tensor.layer
    return "\n".join(lines)


def _line(cells: list[str], columns: tuple[tuple[str, int], ...]) -> str:
    """Cells one beside the other, those of negative width to the left."""
    padded = (
        cell.rjust(width) if width > 0 else cell.ljust(-width)
        for cell, (_, width) in zip(cells, columns, strict=True)
    )
    return " ".join(padded).rstrip()


def _cells(tensor: TensorErrors, alone: Metrics, first: bool) -> list[str]:
    """A row; what is of the whole layer stands in its first one."""
    return [
        tensor.layer if first else "",
        tensor.tensor,
        *(
            _number(x, ".3g")
            for x in (tensor.min, tensor.max, tensor.range_min, tensor.range_max, tensor.scale)
        ),
        _number(tensor.zero_point, "d"),
        *(_number(x, ".2f", 100) for x in (tensor.levels_used, tensor.saturated)),
        _number(tensor.sqnr, ".1f"),
        *(f"{x:.4f}" if first else "" for x in (alone.hr, alone.ndcg)),
    ]


def _number(x: float | None, form: str, unit: int = 1) -> str:
    return "" if x is None else format(unit * x, form)


def write_csv(losses: Losses, path: Path) -> None:
    """Write a row for each model, then one for every tensor, with its layer's metrics and empty where there is none."""
    k = losses.in_float.k

    def metrics(of: Metrics) -> dict[str, float]:
        return {f"HR@{k}": of.hr, f"NDCG@{k}": of.ndcg}

    rows = [{"layer": "float model"} | metrics(losses.in_float)]
    rows += [{"layer": "quantized model"} | metrics(losses.quantized)]
    rows += [asdict(tensor) | metrics(losses.alone[tensor.layer]) for tensor in losses.tensors]
    names = [*TensorErrors.__dataclass_fields__, *metrics(losses.in_float)]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
