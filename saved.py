"""A trained or quantized model from its checkpoint alone: no flags, no data."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

import neumf
from dataset import Split
from distiller.checkpoint import load_checkpoint
from distiller.cli import InputError
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.integer import NotIntegerError
from distiller.quantization.saved import restore
from distiller.quantization.train_aware import without_ranges
from loading import check_finite, check_users_and_items, dummy_input, restore_rounding, warn_of_other_data
from neumf import NeuMF
from neumf_int8 import IntegerNeuMF
from scoring import PairScorer, Scorer, float_scorer

log = logging.getLogger("ncf")


@dataclass(frozen=True)
class SavedModel:
    """What a checkpoint holds, as it is evaluated.

    Attributes:
        model: In float, prepared, or rounding as quantization-aware training does.
        quantizer: That has prepared it; None of a model that is not quantized.
        nb_users: U.
        nb_items: I.
        data_digest: Of the split that it was trained on; None where the file does not say.
        quantization_aware: Whether it rounds as it was trained to.
    """

    model: NeuMF
    quantizer: PostTrainLinearQuantizer | None
    nb_users: int
    nb_items: int
    data_digest: str | None
    quantization_aware: bool

    def check_sizes(self, split: Split, path: str | Path, directory: str | Path) -> None:
        """Raise an ``InputError`` unless the split has the model's users and items; warn where it is another one."""
        sizes = {"nb_users": self.nb_users, "nb_items": self.nb_items}
        check_users_and_items(sizes, split, str(path), directory)
        if self.data_digest not in (None, split.digest):
            warn_of_other_data(path, directory)

    def scorer(self) -> Scorer:
        """What scores with it: in integers where it can, else in floats."""
        if self.quantizer is None:
            return float_scorer(self.model)
        try:
            return IntegerNeuMF(self.model)
        except NotIntegerError as error:
            log.warning("simulated in floats, which is slower: %s", error)
            return PairScorer(self.model, one_user=self.quantizer.dynamic)


def load_saved(path: str | Path) -> SavedModel:
    """Read the model of a checkpoint, ``best.pth.tar`` or ``quantized.pth.tar``, on the CPU.

    Raises:
        InputError: not a whole checkpoint of a NeuMF.
        OSError: it cannot be read.
    """
    checkpoint = load_checkpoint(path)
    quantized, aware = "quantizer" in checkpoint, checkpoint.get("quantization_aware") is not None
    state_dict = checkpoint["state_dict"]
    weights = neumf.weights_of_quantized(state_dict) if quantized else without_ranges(state_dict)
    quantizer = None
    try:
        sizes = neumf.sizes_from_state_dict(weights)
        model = NeuMF(**sizes).eval().requires_grad_(False)
        if quantized:
            quantizer = restore(model, checkpoint, dummy_input(torch.device("cpu")))
        elif aware:
            restore_rounding(model, checkpoint, Namespace(split_final=sizes["split_final"]))
        else:
            model.load_state_dict(weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not quantized:  # whose tensors ``restore`` has checked
        check_finite(weights, str(path))
    return SavedModel(
        model, quantizer, sizes["nb_users"], sizes["nb_items"], checkpoint.get("data_digest"), aware
    )
