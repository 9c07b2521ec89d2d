"""The choice of what scores with a quantized model: integers, or floats that simulate them."""

from __future__ import annotations

import logging

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.integer import NotIntegerError
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.ranking.scorers import PairScorer, Scorer, float_scorer
from neural_cf.runs.models import SavedModel

log = logging.getLogger("ncf")


def quantized_scorer(
    quantizer: PostTrainLinearQuantizer, engine: str = "auto", compiled: bool = False
) -> Scorer:
    """Return what scores with a prepared model. Integers and simulation give the same scores, bit for bit.

    Args:
        quantizer: It has prepared its model.
        engine: One of ``distiller.quantization.flags.ENGINES``. "integer" computes in integers and "simulate" in
            floats. "auto" computes in integers where the model allows it, else in floats with a warning.
        compiled: Compute integers with ``torch.compile``, for as many users and items as the first call has.

    Raises:
        NotIntegerError: ``engine`` is "integer", and the model has a layer that integers cannot compute.
    """
    if engine != "simulate":
        try:
            return IntegerNeuMF(quantizer.model, compiled)
        except NotIntegerError as error:
            if engine == "integer":
                raise
            log.warning("simulated in floats, which is slower: %s", error)
    return PairScorer(quantizer.model, one_user=quantizer.dynamic)


def scorer_of(saved: SavedModel) -> Scorer:
    """Return what scores with a checkpoint's model as it is: quantized where the checkpoint is, else in floats."""
    return float_scorer(saved.model) if saved.quantizer is None else quantized_scorer(saved.quantizer)
