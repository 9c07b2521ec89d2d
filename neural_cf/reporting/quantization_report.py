"""The report of where a quantized model loses accuracy: errors of each tensor, and HR@k and NDCG@k by layer."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path

from distiller.quantization.analysis import TensorErrors
from distiller.system.files import atomic_write
from neural_cf.int8.losses import Losses
from neural_cf.ranking.metrics import Metrics

# The columns of losses_table: heading and width in characters, negative where cells are aligned to the left.
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


def losses_table(losses: Losses) -> str:
    """Return a text of lines up to 120 characters: the metrics of both models, then a table with a row per tensor."""
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
    """Return a line of cells, each padded to its column's width."""
    padded = (
        cell.rjust(width) if width > 0 else cell.ljust(-width)
        for cell, (_, width) in zip(cells, columns, strict=True)
    )
    return " ".join(padded).rstrip()


def _cells(tensor: TensorErrors, alone: Metrics, first: bool) -> list[str]:
    """Return a tensor's row of cells.

    Args:
        tensor: The tensor's errors.
        alone: The metrics with the tensor's layer alone quantized.
        first: Whether this is its layer's first row, the only one that tells what concerns the whole layer.
    """
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


def write_losses(losses: Losses, path: Path) -> None:
    """Write a CSV file: a row for each of the two models, then one for every tensor, with its layer's metrics.

    Cells are empty where there is no value.
    """
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
