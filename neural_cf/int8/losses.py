"""What quantization costs: the error of each tensor, and hit rate (HR@k) and NDCG@k of each layer alone."""

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
    """The cost of quantization, in ranking metrics and in errors of tensors.

    Attributes:
        nb_users: The metrics are over this many users, the first ones.
        in_float: Metrics of the float model.
        quantized: Metrics of the quantized model.
        alone: Metrics of the float model with a single layer quantized, by the name of that layer.
        tensors: Errors of the tensors of the quantized layers, layer after layer.
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
    """Return what quantization costs, measured on a simulation in floats.

    Args:
        model: The float model, on ``device``.
        quantizer: A quantizer that has prepared a copy of ``model``.
        test_fn: A function that runs a model on the data for which tensors are compared.
        split: The split whose test items are ranked for the metrics.
        nb_users: The number of users for the metrics, the first ones of the split.
        k: The k of HR@k and NDCG@k.
        device: The device of the models.
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
