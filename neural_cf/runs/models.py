"""The model of a checkpoint: in float, quantized, or rounding as quantization-aware training left it.

``read_model`` reads any model from its file alone, as commands do that have no other settings. The other functions
read a checkpoint for a run, and check it against the run's data and settings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.saved import restore
from distiller.quantization.train_aware import without_ranges
from distiller.schedule import prepare_quantization_aware
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import (
    NeuMF,
    has_both_branches,
    is_split,
    sizes_from_state_dict,
    weights_of_quantized,
    with_final_layer,
)
from neural_cf.runs.settings import Mode, Settings
from neural_cf.split import Split

Checkpoint = dict[str, Any]

log = logging.getLogger("ncf")


@dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, as it is evaluated.

    Attributes:
        model: The model in float, prepared by ``quantizer``, or rounding as quantization-aware training does.
        quantizer: The quantizer that has prepared the model; None for a model that is not quantized.
        nb_users: Its number of users, U.
        nb_items: Its number of items, I.
        data_digest: The digest of the split that it was trained on; None where the file does not say.
        quantization_aware: Whether it rounds as it was trained to.
    """

    model: NeuMF
    quantizer: PostTrainLinearQuantizer | None
    nb_users: int
    nb_items: int
    data_digest: str | None
    quantization_aware: bool

    def check_sizes(self, split: Split, path: str | Path, directory: str | Path) -> None:
        """Raise an ``InputError`` unless the split has the model's users and items; warn if the data is another."""
        sizes = {"nb_users": self.nb_users, "nb_items": self.nb_items}
        check_users_and_items(sizes, split, str(path), directory)
        if self.data_digest not in (None, split.digest):
            warn_of_other_data(path, directory)


def read_model(path: str | Path) -> SavedModel:
    """Read the model of a checkpoint, ``best.pth.tar`` or ``quantized.pth.tar``, to the CPU.

    Raises:
        InputError: not a whole checkpoint of a NeuMF.
        OSError: the file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    quantized, aware = "quantizer" in checkpoint, checkpoint.get("quantization_aware") is not None
    state_dict = checkpoint["state_dict"]
    weights = weights_of_quantized(state_dict) if quantized else without_ranges(state_dict)
    quantizer = None
    try:
        sizes = sizes_from_state_dict(weights)
        model = NeuMF(**sizes).eval().requires_grad_(False)
        if quantized:
            quantizer = restore(model, checkpoint, dummy_input(torch.device("cpu")))
        elif aware:
            restore_rounding(model, checkpoint, sizes["split_final"])
        else:
            model.load_state_dict(weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not quantized:  # ``restore`` has checked the tensors of a quantized one
        check_finite(weights, str(path))
    return SavedModel(
        model, quantizer, sizes["nb_users"], sizes["nb_items"], checkpoint.get("data_digest"), aware
    )


def load_float(settings: Settings, path: str | Path, checkpoint: Checkpoint, split: Split) -> NeuMF:
    """Return the float model of a checkpoint, its final layer split or not as the settings have it.

    Args:
        settings: The run's.
        path: The checkpoint's file, for messages.
        checkpoint: What was read from it.
        split: The run's data.

    Raises:
        InputError: no checkpoint of a float NeuMF, or its sizes are not those of the data or the settings.
    """
    if "quantizer" in checkpoint:
        raise InputError(
            f"--load: {path} is a quantized model: it can be evaluated, by --evaluate, and nothing else"
        )
    weights = without_ranges(checkpoint["state_dict"])
    sizes = fitting_sizes(weights, settings, path, split)
    check_finite(weights, f"--load: {path}")
    if checkpoint.get("data_digest", split.digest) != split.digest and not settings.resume:
        warn_of_other_data(path, settings.data)
    model = NeuMF(**sizes | {"split_final": settings.split_final})
    model.load_state_dict(with_final_layer(weights, settings.split_final))
    return model


def load_quantized(
    settings: Settings, checkpoint: Checkpoint, split: Split, device: torch.device
) -> PostTrainLinearQuantizer:
    """Return the quantizer, with its prepared model, of a checkpoint that a quantized evaluation left.

    Args:
        settings: The run's; ``settings.load`` is the checkpoint's file.
        checkpoint: What was read from it.
        split: The run's data.
        device: Where the model is to be.

    Raises:
        InputError: not a whole quantized model, its sizes are not those of the data or the settings, or the settings
            ask for it to be quantized again.
    """
    path = settings.load
    for flag, given in (("--quantize-eval", settings.quantize_eval), ("--eval-fp16", settings.eval_fp16)):
        if given:
            raise InputError(f"{flag}: {path} is quantized already: --evaluate evaluates it")
    if "precision" in settings.given:
        raise InputError(f"--precision: {path} is quantized")
    weights = weights_of_quantized(checkpoint["state_dict"])
    sizes = fitting_sizes(weights, settings, path, split)
    if "split_final" in settings.given and not sizes["split_final"]:
        raise InputError(f"--split-final: the final layer of {path} is not split, and was quantized as it is")
    if checkpoint.get("data_digest", split.digest) != split.digest:
        warn_of_other_data(path, settings.data)
    model = NeuMF(**sizes).to(device)
    try:
        return restore(model, checkpoint, dummy_input(device))
    except InputError as error:
        raise InputError(f"--load: {path}: {error}") from error


def restore_rounding(model: NeuMF, checkpoint: Checkpoint, split_final: bool) -> None:
    """Make the model of a quantization-aware checkpoint round as it did in training, with the ranges it had then.

    Args:
        model: In float; changed in place.
        checkpoint: A quantization-aware one.
        split_final: Whether the run asks for a split final layer.

    Raises:
        InputError: the checkpoint's final layer is not as asked for, or the checkpoint is damaged.
    """
    if is_split(checkpoint["state_dict"]) != split_final:
        raise InputError(
            f"--split-final: {'leave it out' if split_final else 'give it'}: a quantization-aware checkpoint "
            "has the ranges of its own final layer"
        )
    try:
        prepare_quantization_aware(model, checkpoint["quantization_aware"])
        model.load_state_dict(checkpoint["state_dict"])
    except (InputError, RuntimeError) as error:
        raise InputError(f"not a whole checkpoint: {' '.join(str(error).split())}") from error


def fitting_sizes(
    weights: dict[str, torch.Tensor], settings: Settings, path: str | Path, split: Split
) -> dict[str, Any]:
    """Return a model's sizes, read off its weights: the arguments of ``NeuMF``.

    Raises:
        InputError: they are not the sizes of a NeuMF, of the data, or of what was asked for.
    """
    try:
        sizes = sizes_from_state_dict(weights)
    except InputError as error:
        raise InputError(f"--load: {path}: {error}") from error
    check_users_and_items(sizes, split, f"--load: {path}", settings.data)
    if not has_both_branches(sizes["mf_dim"], sizes["mlp_layer_sizes"]):
        check_one_branch(settings, path)
    for name, asked, size in (
        ("factors", settings.factors, sizes["mf_dim"]),
        ("layers", list(settings.layers), sizes["mlp_layer_sizes"]),
    ):
        if name in settings.given and asked != size:
            raise InputError(f"--{name}: {asked} asked for, but {path} has {size}")
    return sizes


def check_finite(weights: dict[str, torch.Tensor], where: str) -> None:
    """Raise an ``InputError`` that begins with ``where`` unless all weights are finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds values that are not finite: its training diverged")


def check_users_and_items(sizes: dict[str, Any], split: Split, where: str, directory: str | Path) -> None:
    """Raise an ``InputError`` that begins with ``where`` unless a model's users and items are the split's."""
    if (sizes["nb_users"], sizes["nb_items"]) != (split.nb_users, split.nb_items):
        raise InputError(
            f"{where} has {sizes['nb_users']} users and {sizes['nb_items']} items, "
            f"{directory} has {split.nb_users} and {split.nb_items}"
        )


def check_one_branch(settings: Settings, path: str | Path) -> None:
    """Raise an ``InputError`` for settings that ask of one branch alone what takes a whole model."""
    for flag, given in (
        ("--split-final", settings.split_final),
        ("--quantize-eval", settings.quantize_eval),
        ("--qe-calibration", settings.mode is Mode.CALIBRATE),
        ("--activation-histograms", settings.mode is Mode.HISTOGRAM),
        ("--qe-auto", settings.mode is Mode.AUTO),
    ):
        if given:
            raise InputError(f"{flag}: {path} is one branch alone, which is trained and evaluated in float")


def warn_of_other_data(path: str | Path, directory: str | Path) -> None:
    """Warn that a checkpoint's data has another digest than the split in ``directory``."""
    log.warning("%s was trained on other data than %s, or on a copy of it as CSV files", path, directory)


def training_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's training ``seed`` and whether it was with ``validate``; None where it does not say."""
    config = checkpoint.get("config")
    config = config if isinstance(config, dict) else {}
    return {"seed": config.get("seed"), "validate": config.get("validate")}


def dummy_input(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return arguments of the model's forward, for tracing it."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    return index, index, True
