"""``ncf.py --evaluate``: what scores with a checkpoint as the flags ask, the printed line, and what is left on disk."""

from __future__ import annotations

import copy
import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from distiller.calibration import TestFunction
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.integer import NotIntegerError
from distiller.quantization.statistics import foreign_statistics
from distiller.quantization.wrappers import QuantizedLinear, RowQuantizedEmbedding, ScaledConcat
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.flags import lacks_source
from neural_cf.int8.calibration import calibration_pass
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.int8.losses import measure_losses
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.model import NeuMF
from neural_cf.ranking.candidates import first_users, nb_ranked
from neural_cf.ranking.metrics import describe, metrics_of_ranks
from neural_cf.ranking.places import place_test_items
from neural_cf.ranking.scorers import Scorer, float_scorer
from neural_cf.reporting.evaluation_report import write_report
from neural_cf.reporting.figures import draw_errors, draw_ranges
from neural_cf.reporting.quantization_report import losses_table, write_losses
from neural_cf.runs.directory import BEST, ERRORS, RANGES, REPORT, clear_report, write_quantized, write_ranks
from neural_cf.runs.hardware import choose_compilation
from neural_cf.runs.log import start_log
from neural_cf.runs.models import (
    dummy_input,
    load_model,
    load_quantized,
    quantizer_as_trained,
    restore_rounding,
    training_of,
)
from neural_cf.runs.processes import Processes
from neural_cf.runs.recorder import has_matplotlib
from neural_cf.split import Split

# Where compiling, 10 s at first and 3 s once cached, saves as much: 0.2 us a pair on two Xeon cores (2026-11-23).
PAIRS_WORTH_COMPILING = 40_000_000
log = logging.getLogger("ncf")


def evaluate_checkpoint(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> None:
    """Evaluate in FP32, in half precision, or quantized; a model that is quantized here is kept."""
    checkpoint = load_checkpoint(args.load)
    quantizer = None
    if args.qe_report:
        report_on = calibration_pass(args, split, device, args.qe_report)
        if not has_matplotlib():
            log.warning("--qe-report without pictures, which matplotlib draws: pip install matplotlib")
    if "quantizer" in checkpoint:
        quantizer = load_quantized(args, checkpoint, split, device)
    else:
        model = load_model(args, args.load, checkpoint, split)
        if args.quantize_eval:
            original = copy.deepcopy(model) if args.qe_report else None
            quantizer = quantize(args, model, checkpoint, device)
    if quantizer:
        scorer = scorer_as_asked(args, quantizer, split, device)
    else:
        scorer = unquantized_scorer(args, model, checkpoint, split, device)
    if processes.first:
        start_log(directory, device)
        if quantizer:
            quantizer.save(directory)
            if args.quantize_eval:
                write_quantized(directory, quantizer, args.load, training_of(checkpoint), split)
                clear_report(directory)
    computed = computation_in_integers(scorer) if quantizer else computation(args, checkpoint)
    model = {"checkpoint": str(args.load), "computed": computed} | training_of(checkpoint)
    evaluate_scorer(args, scorer, split, device, processes, directory, model)
    if args.qe_report:
        report_losses(args, report_on, original.to(device), quantizer, split, device, directory)


def quantize(
    args: Namespace, model: NeuMF, checkpoint: dict[str, Any], device: torch.device
) -> PostTrainLinearQuantizer:
    """Quantize a model as the flags ask, or as it was trained to be."""
    if not lacks_source(args):
        quantizer = PostTrainLinearQuantizer.from_args(model.to(device), args)
    elif checkpoint.get("quantization_aware") is not None:
        quantizer = quantizer_as_trained(model.to(device), checkpoint, args)
    else:
        raise InputError("--quantize-eval needs --qe-stats-file, --qe-dynamic or --qe-config-file")
    why = foreign_statistics(model, quantizer.statistics or {})
    if why:
        log.warning("--qe-stats-file seems to belong to another model: %s", why)
    quantizer.prepare_model(dummy_input(device))
    modules = list(model.modules())
    linears = [module for module in modules if isinstance(module, QuantizedLinear)]
    for flag, given, effects in (
        ("--qe-scaled-concat", args.qe_scaled_concat, (isinstance(x, ScaledConcat) for x in modules)),
        ("--qe-per-channel-acts", args.qe_per_channel_acts, (x.has_output_scales for x in linears)),
        (
            "--qe-embedding-bits",
            args.qe_embedding_bits,
            (isinstance(x, RowQuantizedEmbedding) for x in modules),
        ),
    ):
        if given and not any(effects):
            raise InputError(f"{flag} has no effect on any layer with these settings")
    return quantizer


def scorer_as_asked(
    args: Namespace, quantizer: PostTrainLinearQuantizer, split: Split, device: torch.device
) -> Scorer:
    """Return what scores with a quantized model, by ``--qe-engine``."""
    flag, engine = "--qe-engine integer", args.qe_engine
    if args.qe_convert_pytorch:
        flag, engine = "--qe-convert-pytorch", "integer"
    try:
        return quantized_scorer(quantizer, engine, worth_compiling(args, split, device))
    except NotIntegerError as error:
        raise InputError(f"{flag}: {error}") from error


def unquantized_scorer(
    args: Namespace, model: NeuMF, checkpoint: dict[str, Any], split: Split, device: torch.device
) -> Scorer:
    """What scores with a float model: in float32, bfloat16 or half precision, or rounding as it was trained to."""
    if "qe_engine" in args.given or args.qe_convert_pytorch:
        raise InputError(f"--qe-engine: {args.load} is not quantized: --quantize-eval quantizes it")
    if checkpoint.get("quantization_aware") is not None:
        for flag, given in (("--eval-fp16", args.eval_fp16), ("--precision", args.precision == "bf16")):
            if given:
                raise InputError(f"{flag}: {args.load} was trained to round in float32")
        restore_rounding(model, checkpoint, args)
        log.info("Evaluated as trained: quantization-aware, with rounded weights and activations")
    model.to(device)
    if args.eval_fp16:
        return float_scorer(model.half())
    if args.precision == "bf16":
        return float_scorer(model, torch.bfloat16, worth_compiling(args, split, device))
    return float_scorer(model)


def worth_compiling(args: Namespace, split: Split, device: torch.device) -> bool:
    """Whether compiling an evaluation of integers or bfloat16 takes less time than it saves, and is wanted.

    On a GPU it would contract a product and a sum into one operation, and round otherwise than the simulation.
    """
    pairs = split.nb_users * nb_ranked(split, args.ranking)
    return device.type == "cpu" and pairs >= PAIRS_WORTH_COMPILING and choose_compilation(args, device)


def computation_in_integers(scorer: Scorer) -> str:
    """What a quantized model was computed in, for a report."""
    return "integers" if isinstance(scorer, IntegerNeuMF) else "integers simulated in floats"


def computation(args: Namespace, checkpoint: dict[str, Any]) -> str:
    """The same of a checkpoint that is evaluated as it was trained, or in other floats."""
    if checkpoint.get("quantization_aware") is not None:
        return "fp32, rounded as in training"
    return "fp16" if args.eval_fp16 else args.precision or "fp32"


def evaluate_scorer(
    args: Namespace,
    scorer: Scorer,
    split: Split,
    device: torch.device,
    processes: Processes,
    directory: Path | None,
    model: dict[str, Any],
    title: str = "Initial",
) -> None:
    """Rank the test items, print the metrics, and leave ranks and, if asked for, a report.

    Args:
        args: The flags.
        scorer: What scores.
        split: Whose test items.
        device: The scorer's.
        processes: That share them.
        directory: Where ranks go; None in a process that is not the first.
        model: What is scored with, for the report.
        title: Stands before the metrics.
    """
    length = max(args.cutoffs) if args.report else 0
    start = time.perf_counter()
    places = place_test_items(
        scorer, split, args.topk, device, processes, ranking=args.ranking, length=length
    )
    val_time = time.perf_counter() - start
    if processes.first:
        write_ranks(directory, places.ranks)
    metrics = describe([metrics_of_ranks(places.ranks, k) for k in args.cutoffs])
    log.info("%s %s, val_time = %.2f", title, metrics, val_time)
    if processes.first and args.report:
        write_report(args.report, args, split, places, model, device)
        log.info("Report written to %s", args.report)


def evaluate_best(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> None:
    """Evaluate the best epoch's model on the test items, which nothing has looked at before.

    Args:
        args: The flags.
        split: With the test items.
        device: The model's.
        processes: That share them.
        directory: The run's; None in a process that is not the first.
    """
    checkpoint = None
    if processes.first:
        checkpoint = load_checkpoint(directory / BEST)
        needed = ("state_dict", "quantization_aware", "epoch", "config", "data_digest")
        checkpoint = {key: checkpoint[key] for key in needed}
    checkpoint = processes.agree(checkpoint)
    model = load_model(args, BEST, checkpoint, split)
    if checkpoint["quantization_aware"] is not None:
        restore_rounding(model, checkpoint, args)
    scorer = float_scorer(model.to(device))
    path = str(directory / BEST) if processes.first else None
    computed = "fp32" if checkpoint["quantization_aware"] is None else "fp32, rounded as in training"
    origin = {"checkpoint": path, "computed": computed} | training_of(checkpoint)
    epoch = checkpoint["epoch"]
    title = "Test, as joined:" if epoch < 0 else f"Test, by epoch {epoch}:"
    evaluate_scorer(args, scorer, split, device, processes, directory, origin, title)


def warn_of_validation_items(checkpoint: dict[str, Any] | None, path: str | Path | None) -> None:
    """Warn where training goes on from a model that has seen what it is to be validated by."""
    config = checkpoint.get("config") if checkpoint else None
    if checkpoint and not (isinstance(config, dict) and config.get("validate")):
        log.warning("--validate: %s was trained on the items that it is validated by from here on", path)


def report_losses(
    args: Namespace,
    test_fn: TestFunction,
    original: NeuMF,
    quantizer: PostTrainLinearQuantizer,
    split: Split,
    device: torch.device,
    directory: Path,
) -> None:
    """Say where quantization loses accuracy: on the screen, as a CSV file and, where matplotlib is, as pictures."""
    nb_users = first_users(split, args.qe_report)
    losses = measure_losses(original, quantizer, test_fn, split, nb_users, args.topk, device)
    log.info("%s", losses_table(losses))
    write_losses(losses, directory / REPORT)
    if has_matplotlib():
        draw_ranges(losses, directory / RANGES)
        draw_errors(losses, directory / ERRORS)
    log.info("Report written to %s", directory)
