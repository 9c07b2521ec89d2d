"""``neural-cf evaluate`` and ``ncf.py --evaluate``: rank test items with a checkpoint, in floats or quantized."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from distiller.calibration import TestFunction
from distiller.quantization import PostTrainLinearQuantizer, add_post_train_quant_args
from distiller.quantization.integer import NotIntegerError
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.flags import (
    add_final_layer,
    add_half_precision,
    add_load,
    add_loss_report,
    add_metrics,
    add_precision,
    add_run_flags,
    new_parser,
)
from neural_cf.commands.start import started
from neural_cf.int8.calibration import calibration_data
from neural_cf.int8.engine import IntegerNeuMF
from neural_cf.int8.losses import measure_losses
from neural_cf.int8.preparation import prepare
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.model import NeuMF
from neural_cf.ranking.candidates import first_users, nb_ranked
from neural_cf.ranking.metrics import describe, metrics_of_ranks
from neural_cf.ranking.places import place_test_items
from neural_cf.ranking.scorers import Scorer, float_scorer
from neural_cf.reporting.evaluation_report import write_report
from neural_cf.reporting.figures import draw_errors, draw_ranges
from neural_cf.reporting.quantization_report import losses_table, write_losses
from neural_cf.runs.directory import (
    BEST,
    ERRORS,
    RANGES,
    REPORT,
    clear_report,
    write_quantized,
    write_ranks,
)
from neural_cf.runs.hardware import choose_compilation
from neural_cf.runs.log import start_log
from neural_cf.runs.models import Checkpoint, load_float, load_quantized, restore_rounding, training_of
from neural_cf.runs.recorder import has_matplotlib
from neural_cf.runs.run import Run

PROG = "neural-cf evaluate"
# Where compiling, 10 s at first and 3 s once cached, saves as much: 0.2 us a pair on two Xeon cores (2026-11-23).
PAIRS_WORTH_COMPILING = 40_000_000

log = logging.getLogger("ncf")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    parser = new_parser(PROG, "Evaluate a checkpoint on every user's test item, in FP32 or quantized.")
    parser.set_defaults(evaluate=True)
    evaluation = parser.add_argument_group("Evaluation")
    add_load(evaluation.add_argument, "best.pth.tar, or the quantized.pth.tar of an evaluation")
    add_final_layer(evaluation.add_argument)
    add_precision(evaluation.add_argument)
    add_half_precision(evaluation)
    add_metrics(evaluation.add_argument)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    add_post_train_quant_args(parser, calibration=False)
    add_loss_report(parser.add_argument_group("Report of what quantization loses").add_argument)
    settings = parse_settings(argv, parser)
    with started(settings, PROG) as run:
        evaluate_checkpoint(run)


def evaluate_checkpoint(run: Run) -> None:
    """Evaluate a checkpoint in floats or quantized, and keep the model that is quantized here."""
    settings = run.settings
    checkpoint = load_checkpoint(settings.load)
    if settings.qe_report:
        report_data = calibration_data(run, settings.qe_report)
        if not has_matplotlib():
            log.warning("--qe-report without pictures, which matplotlib draws: pip install matplotlib")
    quantizer = None
    if "quantizer" in checkpoint:
        quantizer = load_quantized(settings, checkpoint, run.split, run.device)
    else:
        model = load_float(settings, settings.load, checkpoint, run.split)
        if settings.quantize_eval:
            original = copy.deepcopy(model) if settings.qe_report else None
            quantizer = prepare(settings, model, checkpoint, run.device)
    scorer = scorer_of_quantized(run, quantizer) if quantizer else scorer_of_float(run, model, checkpoint)
    if run.processes.first:
        start_log(run.directory, run.device)
        if quantizer:
            leave_quantized(run, quantizer, checkpoint)
    computed = computation_in_integers(scorer) if quantizer else computation_in_floats(run, checkpoint)
    origin = {"checkpoint": str(settings.load), "computed": computed} | training_of(checkpoint)
    evaluate_scorer(run, scorer, origin)
    if settings.qe_report:
        report_losses(run, report_data, original.to(run.device), quantizer)


def leave_quantized(run: Run, quantizer: PostTrainLinearQuantizer, checkpoint: Checkpoint) -> None:
    """Write the parameters of a quantized model to the run's directory, and the model if it was quantized here."""
    quantizer.save(run.directory)
    if run.settings.quantize_eval:
        write_quantized(run.directory, quantizer, run.settings.load, training_of(checkpoint), run.split)
        clear_report(run.directory)


def scorer_of_quantized(run: Run, quantizer: PostTrainLinearQuantizer) -> Scorer:
    """Return what scores with a quantized model, by ``--qe-engine``.

    Raises:
        InputError: integers are asked for, and a layer has settings that they cannot compute.
    """
    flag, engine = "--qe-engine integer", run.settings.qe_engine
    if run.settings.qe_convert_pytorch:
        flag, engine = "--qe-convert-pytorch", "integer"
    compiled = engine != "simulate" and worth_compiling(run)
    try:
        return quantized_scorer(quantizer, engine, compiled)
    except NotIntegerError as error:
        raise InputError(f"{flag}: {error}") from error


def scorer_of_float(run: Run, model: NeuMF, checkpoint: Checkpoint) -> Scorer:
    """Return what scores with a float model: in float32, bfloat16 or half precision, or rounding as it was trained to.

    Raises:
        InputError: a setting is for a quantized model, or is not how a quantization-aware one was trained.
    """
    settings = run.settings
    if "qe_engine" in settings.given or settings.qe_convert_pytorch:
        raise InputError(f"--qe-engine: {settings.load} is not quantized: --quantize-eval quantizes it")
    if checkpoint.get("quantization_aware") is not None:
        for flag, given in (
            ("--eval-fp16", settings.eval_fp16),
            ("--precision", settings.precision == "bf16"),
        ):
            if given:
                raise InputError(f"{flag}: {settings.load} was trained to round in float32")
        restore_rounding(model, checkpoint, settings.split_final)
        log.info("Evaluated as trained: quantization-aware, with rounded weights and activations")
    model.to(run.device)
    if settings.eval_fp16:
        return float_scorer(model.half())
    if settings.precision == "bf16":
        return float_scorer(model, torch.bfloat16, worth_compiling(run))
    return float_scorer(model)


def worth_compiling(run: Run) -> bool:
    """Return whether compiling an evaluation of integers or bfloat16 takes less time than it saves, and is wanted.

    On a GPU it would contract a product and a sum into one operation, and round otherwise than the simulation.
    """
    pairs = run.split.nb_users * nb_ranked(run.split, run.settings.ranking)
    worth = run.device.type == "cpu" and pairs >= PAIRS_WORTH_COMPILING
    return worth and choose_compilation(run.settings, run.device)


def computation_in_integers(scorer: Scorer) -> str:
    """Return what a quantized model is computed in, for a report."""
    return "integers" if isinstance(scorer, IntegerNeuMF) else "integers simulated in floats"


def computation_in_floats(run: Run, checkpoint: Checkpoint) -> str:
    """Return what a model that is not quantized is computed in, for a report."""
    if checkpoint.get("quantization_aware") is not None:
        return "fp32, rounded as in training"
    return "fp16" if run.settings.eval_fp16 else run.settings.precision or "fp32"


def evaluate_scorer(run: Run, scorer: Scorer, origin: dict[str, Any], title: str = "") -> None:
    """Rank the test items, print the metrics, and leave the ranks and, if asked for, a report.

    Args:
        run: The run.
        scorer: What scores.
        origin: What scores, for the report: ``checkpoint``, ``computed`` and the training's ``seed`` and ``validate``.
        title: Text that stands before the metrics.
    """
    settings = run.settings
    start = time.perf_counter()
    places = place_test_items(
        scorer,
        run.split,
        settings.k,
        run.device,
        run.processes,
        ranking=settings.ranking,
        length=max(settings.cutoffs) if settings.report else 0,
    )
    val_time = time.perf_counter() - start
    if run.processes.first:
        write_ranks(run.directory, places.ranks)
    metrics = describe([metrics_of_ranks(places.ranks, k) for k in settings.cutoffs])
    log.info("%s%s, val_time = %.2f", title, metrics, val_time)
    if run.processes.first and settings.report:
        write_report(run, places, origin)
        log.info("Report written to %s", settings.report)


def evaluate_best(run: Run) -> None:
    """Evaluate the best epoch's model on the test items, which nothing has looked at before."""
    checkpoint = None
    if run.processes.first:
        checkpoint = load_checkpoint(run.directory / BEST)
        needed = ("state_dict", "quantization_aware", "epoch", "config", "data_digest")
        checkpoint = {key: checkpoint[key] for key in needed}
    checkpoint = run.processes.agree(checkpoint)
    model = load_float(run.settings, BEST, checkpoint, run.split)
    if checkpoint["quantization_aware"] is not None:
        restore_rounding(model, checkpoint, run.settings.split_final)
    scorer = float_scorer(model.to(run.device))
    computed = "fp32" if checkpoint["quantization_aware"] is None else "fp32, rounded as in training"
    origin = {"checkpoint": str(run.directory / BEST), "computed": computed} | training_of(checkpoint)
    epoch = checkpoint["epoch"]
    evaluate_scorer(run, scorer, origin, "Test, as joined: " if epoch < 0 else f"Test, by epoch {epoch}: ")


def report_losses(run: Run, data: TestFunction, original: NeuMF, quantizer: PostTrainLinearQuantizer) -> None:
    """Show where quantization loses accuracy: on the screen, as a CSV file and, where matplotlib is, as pictures."""
    nb_users = first_users(run.split, run.settings.qe_report)
    losses = measure_losses(original, quantizer, data, run.split, nb_users, run.settings.k, run.device)
    log.info("%s", losses_table(losses))
    write_losses(losses, run.directory / REPORT)
    if has_matplotlib():
        draw_ranges(losses, run.directory / RANGES)
        draw_errors(losses, run.directory / ERRORS)
    log.info("Report written to %s", run.directory)
