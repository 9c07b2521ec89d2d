"""Export a model to ONNX or torch.export, and check the file's scores against the model's own."""

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
from neural_cf.runs.models import SavedModel, dummy_input, load_saved
from neural_cf.serving.exported_scorers import (
    INPUTS,
    OUTPUT,
    ExportedScorer,
    OnnxScorer,
    TorchScorer,
    save_exported,
)

FORMATS = {".onnx": "onnx", ".pt2": "torch"}
SAMPLE_USERS, SAMPLE_ITEMS, SAMPLE_SEED = 100, 100, 0  # 10,000 pairs: a second's work
# The greatest difference of probabilities that passes. In float32, sums in another order: 1.4e-6 of 6 M scores of
# ml-1m. Of a quantized model, a value between two levels that comes to lie on the other one: that changed 1 of 60,000
# of these scores, by up to 0.031, which is two levels of a logit in [-8, 8] where the sigmoid is steepest.
FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 1e-5, 0.05
ALIKE = 1e-6  # float32 has no fewer levels than that of probabilities


class ScoresDifferError(Exception):
    """An exported model's scores are not the checkpoint's."""


@dataclass(frozen=True)
class Differences:
    """Absolute differences between two models' probabilities.

    Attributes:
        max: Greatest.
        mean: Mean.
        equal: Share that is at most ``ALIKE``.
        pairs: How many.
    """

    max: float
    mean: float
    equal: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs: max {self.max:.2g}, mean {self.mean:.2g}, {100 * self.equal:.2f} % equal"


def compare_scores(model: Scorer, exported: Scorer, users: Tensor, items: Tensor) -> Differences:
    """Compare scores of items (B, C) for users (B,): the exported model's of the first pair alone, then of all."""
    expected, found = model(users, items), exported(users, items)
    found[:1, :1] = exported(users[:1], items[:1, :1])
    difference = (expected.double() - found.double()).abs().nan_to_num(nan=torch.inf)
    equal = (difference <= ALIKE).double().mean().item()
    return Differences(difference.max().item(), difference.mean().item(), equal, difference.numel())


def sample(saved: SavedModel) -> tuple[Tensor, Tensor]:
    """Users (B,) and items (B, C), drawn with replacement."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    users = torch.randint(saved.nb_users, (SAMPLE_USERS,), generator=generator)
    return users, torch.randint(saved.nb_items, (SAMPLE_USERS, SAMPLE_ITEMS), generator=generator)


def write_onnx(saved: SavedModel, path: Path) -> ExportedScorer:
    """Write a model as ONNX; what scores with the file."""
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
    """Write a model by ``torch.export``; what scores with the file."""
    save_exported(saved.model, path)
    return TorchScorer(path)


def export(saved: SavedModel, out: Path, kind: str, tolerance: float) -> Differences:
    """Write a model and check it; the file gets its name only if it passes.

    Args:
        saved: The model.
        out: The file.
        kind: One of ``FORMATS``' values.
        tolerance: The greatest difference of probabilities that passes.

    Raises:
        InputError: the format cannot hold the model.
        ScoresDifferError: a difference is greater than that; nothing is written.
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
    """The model of a checkpoint.

    Raises:
        InputError: not a checkpoint, or of a model that only quantizing it makes exportable.
    """
    saved = load_saved(path)
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
