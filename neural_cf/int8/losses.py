"""What quantization costs: tensor by tensor, and layer by layer in HR@k and NDCG@k."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from distiller.calibration import TestFunction
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.analysis import TensorErrors, compare_tensors
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.model import NeuMF
from neural_cf.ranking.metrics import Metrics
from neural_cf.ranking.places import evaluate
from neural_cf.ranking.scorers import Scorer, float_scorer
from neural_cf.runs.models import dummy_input
from neural_cf.split import Split


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
        alone[layer] = metrics(quantized_scorer(one, "simulate"))
    return Losses(
        nb_users,
        metrics(float_scorer(model)),
        metrics(quantized_scorer(quantizer, "simulate")),
        alone,
        tensors,
    )
