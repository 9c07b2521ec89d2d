"""Exporting a model to ONNX or with ``torch.export``, and checking the file's scores against the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distiller.graph import leaf_modules, module_graph
from distiller.system.cli import InputError
from distiller.system.files import atomic_write
from neural_cf.int8.engine import TABLES
from neural_cf.int8.scorer import scorer_of
from neural_cf.ranking.scorers import Scorer
from neural_cf.runs.models import SavedModel, dummy_input, read_model
from neural_cf.serving.exported_scorers import (
    INPUTS,
    OUTPUT,
    ExportedScorer,
    OnnxScorer,
    TorchScorer,
    save_exported,
)

FORMATS = {".onnx": "onnx", ".pt2": "torch"}
# The sample that is checked: 100 items for each of 100 users, a second's work.
SAMPLE_USERS, SAMPLE_ITEMS, SAMPLE_SEED = 100, 100, 0
# The greatest difference of probabilities that passes. A float32 model's sums may be taken in another order: of 6
# million scores of ml-1m that changed none by more than 1.4e-6. In a quantized model, a value halfway between two
# levels may also be rounded to the other one: that changed 1 of 60,000 of these scores, by up to 0.031, which is two
# levels of a logit in [-8, 8] where the sigmoid is steepest.
FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 1e-5, 0.05
# The greatest difference of probabilities that count as equal: float32's rounding makes differences of that size.
ALIKE = 1e-6


class ScoresDifferError(Exception):
    """An error: the exported model's scores differ from the checkpoint's."""


@dataclass(frozen=True)
class Differences:
    """The absolute differences between the probabilities that two models give the same pairs of user and item.

    Attributes:
        max: The greatest difference.
        mean: The mean difference.
        equal: The share of pairs whose difference is at most ``ALIKE``.
        pairs: The number of pairs.
    """

    max: float
    mean: float
    equal: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs: max {self.max:.2g}, mean {self.mean:.2g}, {100 * self.equal:.2f} % equal"


def compare_scores(model: Scorer, exported: Scorer, users: Tensor, items: Tensor) -> Differences:
    """Return how an exported model's scores differ from the model's own, of items (B, C) for users (B,).

    The first pair's score comes from a call of its own, which shows that the exported model takes any number of pairs.
    """
    expected, found = model(users, items), exported(users, items)
    found[:1, :1] = exported(users[:1], items[:1, :1])
    difference = (expected.double() - found.double()).abs().nan_to_num(nan=torch.inf)
    equal = (difference <= ALIKE).double().mean().item()
    return Differences(difference.max().item(), difference.mean().item(), equal, difference.numel())


def sample(saved: SavedModel) -> tuple[Tensor, Tensor]:
    """Draw a model's users (B,) and items (B, C), int64, with replacement; always the same ones."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    users = torch.randint(saved.nb_users, (SAMPLE_USERS,), generator=generator)
    return users, torch.randint(saved.nb_items, (SAMPLE_USERS, SAMPLE_ITEMS), generator=generator)


def write_onnx(saved: SavedModel, path: Path) -> ExportedScorer:
    """Write a model as ONNX, and return a scorer that runs the file."""
    import onnx

    from distiller.onnx_graph import onnx_model

    inputs = {table: next(x for x in INPUTS if f"_{x}_" in table) for table in TABLES}
    if saved.quantizer is None:
        graph = module_graph(saved.model, dummy_input(torch.device("cpu")))
        model = onnx_model(graph, leaf_modules(saved.model), inputs, OUTPUT)
    else:
        quantizer = saved.quantizer
        model = onnx_model(quantizer.graph, quantizer.modules, inputs, OUTPUT, quantizer.weights)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return OnnxScorer(path)


def write_torch(saved: SavedModel, path: Path) -> ExportedScorer:
    """Write a model with ``torch.export``, and return a scorer that runs the file."""
    save_exported(saved.model, path)
    return TorchScorer(path)


def export(saved: SavedModel, out: Path, kind: str, tolerance: float) -> Differences:
    """Write a model, check it and print the result; the file gets its name only where the check passes.

    Args:
        saved: The model.
        out: The file's path.
        kind: The format, a value of ``FORMATS``.
        tolerance: The greatest difference of probabilities that passes.

    Returns:
        The differences that the check found.

    Raises:
        InputError: the format cannot hold the model.
        ScoresDifferError: a difference is greater than ``tolerance``; nothing is written.
    """
    with atomic_write(out) as temporary:
        scorer = (write_onnx if kind == "onnx" else write_torch)(saved, temporary)
        differences = compare_scores(scorer_of(saved), scorer, *sample(saved))
        print(f"{out}: against the checkpoint, {differences}")
        if not differences.max <= tolerance:
            raise ScoresDifferError(
                f"{out} is not written: its scores differ by up to {differences.max:.2g}, "
                f"more than --tolerance {tolerance:g}"
            )
    return differences


def exportable(path: Path, kind: str) -> SavedModel:
    """Return the model of a checkpoint.

    Args:
        path: The checkpoint.
        kind: The format that it is to be exported to, a value of ``FORMATS``, for messages.

    Raises:
        InputError: the file is no checkpoint, or its model cannot be exported: it is quantization-aware and has not
            been quantized yet, or it is quantized dynamically.
    """
    saved = read_model(path)
    if saved.quantization_aware:
        raise InputError(
            f"{path} rounds as it was trained to: ncf.py --evaluate --quantize-eval makes a quantized.pth.tar of it, "
            "which can be exported"
        )
    if saved.quantizer is not None and saved.quantizer.dynamic:
        layers = saved.model.named_modules()
        layer = next(name for name, module in layers if getattr(module, "dynamic", False))
        raise InputError(
            f"{path}: layer {layer} finds its ranges on every batch, which {kind} has no form for"
        )
    return saved
