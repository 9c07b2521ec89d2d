"""Models from checkpoints: checked against the data and the flags, float, quantized or quantization-aware."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.conversion import quantizer_of_aware
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
from neural_cf.split import Split

log = logging.getLogger("ncf")


def load_model(args: Namespace, path: str | Path, checkpoint: dict[str, Any], split: Split) -> NeuMF:
    """The float model of a checkpoint read from ``path``, its final layer as the flags have it.

    Raises:
        InputError: no checkpoint of a NeuMF, or its sizes are not the data's or the flags'.
    """
    if "quantizer" in checkpoint:
        raise InputError(
            f"--load: {path} is a quantized model: it can be evaluated, by --evaluate, and nothing else"
        )
    weights = without_ranges(checkpoint["state_dict"])
    sizes = fitting_sizes(weights, args, path, split)
    check_finite(weights, f"--load: {path}")
    if checkpoint.get("data_digest", split.digest) != split.digest and not args.resume:
        warn_of_other_data(path, args.data)
    model = NeuMF(**sizes | {"split_final": args.split_final})
    model.load_state_dict(with_final_layer(weights, args.split_final))
    return model


def check_finite(weights: dict[str, torch.Tensor], where: str) -> None:
    """Raise an ``InputError`` that begins with ``where`` unless all weights are finite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds values that are not finite: its training diverged")


def fitting_sizes(
    weights: dict[str, torch.Tensor], args: Namespace, path: str | Path, split: Split
) -> dict[str, Any]:
    """The sizes of a model by its weights; an ``InputError`` unless they are the data's and the flags'."""
    try:
        sizes = sizes_from_state_dict(weights)
    except InputError as error:
        raise InputError(f"--load: {path}: {error}") from error
    check_users_and_items(sizes, split, f"--load: {path}", args.data)
    if not has_both_branches(sizes["mf_dim"], sizes["mlp_layer_sizes"]):
        check_one_branch(args, path)
    for name, size in (("factors", sizes["mf_dim"]), ("layers", sizes["mlp_layer_sizes"])):
        if name in args.given and getattr(args, name) != size:
            raise InputError(f"--{name}: {getattr(args, name)} asked for, but {path} has {size}")
    return sizes


def check_users_and_items(sizes: dict[str, Any], split: Split, where: str, directory: str | Path) -> None:
    """Raise an ``InputError`` that begins with ``where`` unless a model's users and items are the split's."""
    if (sizes["nb_users"], sizes["nb_items"]) != (split.nb_users, split.nb_items):
        raise InputError(
            f"{where} has {sizes['nb_users']} users and {sizes['nb_items']} items, "
            f"{directory} has {split.nb_users} and {split.nb_items}"
        )


def check_one_branch(args: Namespace, path: str | Path) -> None:
    """Raise an ``InputError`` for flags that ask of a branch alone what takes a whole model."""
    for flag, given in (
        ("--split-final", args.split_final),
        ("--quantize-eval", args.quantize_eval),
        ("--qe-calibration", args.qe_calibration),
        ("--activation-histograms", args.activation_histograms),
        ("--qe-auto", args.qe_auto),
    ):
        if given:
            raise InputError(f"{flag}: {path} is one branch alone, which is trained and evaluated in float")


def warn_of_other_data(path: str | Path, directory: str | Path) -> None:
    """Say that a checkpoint's data has another digest than the split's in ``directory``."""
    log.warning("%s was trained on other data than %s, or on a copy of it as CSV files", path, directory)


def load_quantized(
    args: Namespace, checkpoint: dict[str, Any], split: Split, device: torch.device
) -> PostTrainLinearQuantizer:
    """The quantized model of a checkpoint that a quantized evaluation left, with its settings.

    Raises:
        InputError: not a whole one, its sizes are not the data's or the flags', or flags would quantize it again.
    """
    for flag, given in (("--quantize-eval", args.quantize_eval), ("--eval-fp16", args.eval_fp16)):
        if given:
            raise InputError(f"{flag}: {args.load} is quantized already: --evaluate evaluates it")
    if "precision" in args.given:
        raise InputError(f"--precision: {args.load} is quantized")
    weights = weights_of_quantized(checkpoint["state_dict"])
    sizes = fitting_sizes(weights, args, args.load, split)
    if "split_final" in args.given and not sizes["split_final"]:
        raise InputError(
            f"--split-final: the final layer of {args.load} is not split, and was quantized as it is"
        )
    if checkpoint.get("data_digest", split.digest) != split.digest:
        warn_of_other_data(args.load, args.data)
    model = NeuMF(**sizes).to(device)
    try:
        return restore(model, checkpoint, dummy_input(device))
    except InputError as error:
        raise InputError(f"--load: {args.load}: {error}") from error


def training_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The seed that a checkpoint says it was trained from, and whether with ``--validate``; None where it does not."""
    config = checkpoint.get("config")
    config = config if isinstance(config, dict) else {}
    return {"seed": config.get("seed"), "validate": config.get("validate")}


def dummy_input(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Arguments of the model's forward, for tracing it."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    return index, index, True


def quantizer_as_trained(
    model: NeuMF, checkpoint: dict[str, Any], args: Namespace
) -> PostTrainLinearQuantizer:
    """The quantizer of a quantization-aware checkpoint's float model, with the settings and ranges of its training.

    Raises:
        InputError: flags ask for other ones, or the checkpoint's do not fit.
    """
    of_evaluation = {"qe_engine", "qe_convert_pytorch"}
    other = sorted(name for name in args.given - of_evaluation if name.startswith("qe_"))
    if other:
        raise InputError(
            f"--{other[0].replace('_', '-')}: {args.load} is quantized as it was trained; with --qe-stats-file its "
            "float weights are quantized as asked for"
        )
    aware = copy.deepcopy(model)
    restore_rounding(aware, checkpoint, args)
    try:
        return quantizer_of_aware(aware, model)
    except InputError as error:
        raise InputError(f"--load: {args.load}: {error}") from error


def restore_rounding(model: NeuMF, checkpoint: dict[str, Any], args: Namespace) -> None:
    """Make the model of a quantization-aware checkpoint round as it did in training, with the ranges it had."""
    if is_split(checkpoint["state_dict"]) != args.split_final:
        raise InputError(
            f"--split-final: {'leave it out' if args.split_final else 'give it'}: a quantization-aware checkpoint "
            "has the ranges of its own final layer"
        )
    try:
        prepare_quantization_aware(model, checkpoint["quantization_aware"])
        model.load_state_dict(checkpoint["state_dict"])
    except (InputError, RuntimeError) as error:
        raise InputError(f"not a whole checkpoint: {' '.join(str(error).split())}") from error


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


def load_saved(path: str | Path) -> SavedModel:
    """Read the model of a checkpoint, ``best.pth.tar`` or ``quantized.pth.tar``, on the CPU.

    Raises:
        InputError: not a whole checkpoint of a NeuMF.
        OSError: it cannot be read.
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
