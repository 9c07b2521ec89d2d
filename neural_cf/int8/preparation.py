"""Quantizing a float model as settings ask: its layers replaced by quantized ones, which is called preparing it."""

from __future__ import annotations

import copy
import logging

import torch

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.conversion import quantizer_of_aware
from distiller.quantization.statistics import foreign_statistics
from distiller.quantization.wrappers import QuantizedLinear, RowQuantizedEmbedding, ScaledConcat
from distiller.system.cli import InputError
from neural_cf.model import NeuMF
from neural_cf.runs.models import Checkpoint, dummy_input, restore_rounding
from neural_cf.runs.settings import Settings

# The settings that go with a quantization-aware checkpoint: they do not say how to quantize.
OF_EVALUATION = {"qe_engine", "qe_convert_pytorch"}

log = logging.getLogger("ncf")


def prepare(
    settings: Settings, model: NeuMF, checkpoint: Checkpoint, device: torch.device
) -> PostTrainLinearQuantizer:
    """Quantize a model as the settings ask, or else as it was trained to be.

    Args:
        settings: The run's; ``settings.load`` is the checkpoint's file.
        model: The float model of ``checkpoint``; changed in place.
        checkpoint: Where the model is from.
        device: Where the model is to be.

    Returns:
        The quantizer, which has prepared the model.

    Raises:
        InputError: nothing says where ranges come from, a setting is wrong or has no effect on any layer.
    """
    if settings.names_ranges:
        quantizer = PostTrainLinearQuantizer.from_args(model.to(device), settings)
    elif checkpoint.get("quantization_aware") is not None:
        quantizer = quantizer_as_trained(settings, model.to(device), checkpoint)
    else:
        raise InputError("--quantize-eval needs --qe-stats-file, --qe-dynamic or --qe-config-file")
    why = foreign_statistics(model, quantizer.statistics or {})
    if why:
        log.warning("--qe-stats-file seems to belong to another model: %s", why)
    quantizer.prepare_model(dummy_input(device))
    check_effects(settings, model)
    return quantizer


def check_effects(settings: Settings, model: NeuMF) -> None:
    """Raise an ``InputError`` for a setting that has changed no layer of a prepared model."""
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, QuantizedLinear)]
    for flag, given, effects in (
        ("--qe-scaled-concat", settings.qe_scaled_concat, [isinstance(x, ScaledConcat) for x in modules]),
        ("--qe-per-channel-acts", settings.qe_per_channel_acts, [x.has_output_scales for x in linears]),
        (
            "--qe-embedding-bits",
            settings.qe_embedding_bits,
            [isinstance(x, RowQuantizedEmbedding) for x in modules],
        ),
    ):
        if given and not any(effects):
            raise InputError(f"{flag} has no effect on any layer with these settings")


def quantizer_as_trained(
    settings: Settings, model: NeuMF, checkpoint: Checkpoint
) -> PostTrainLinearQuantizer:
    """Return the quantizer of a quantization-aware checkpoint's float model, with the ranges of its training.

    Raises:
        InputError: settings ask for other ones, or the checkpoint's do not fit the model.
    """
    other = sorted(name for name in settings.given - OF_EVALUATION if name.startswith("qe_"))
    if other:
        raise InputError(
            f"--{other[0].replace('_', '-')}: {settings.load} is quantized as it was trained; with --qe-stats-file its "
            "float weights are quantized as asked for"
        )
    aware = copy.deepcopy(model)
    restore_rounding(aware, checkpoint, settings.split_final)
    try:
        return quantizer_of_aware(aware, model)
    except InputError as error:
        raise InputError(f"--load: {settings.load}: {error}") from error
