"""Evaluation on the test items as the flags ask: ranks, the printed line, and what is left on disk."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import recording
from dataset import Split
from distiller.checkpoint import load_checkpoint
from evaluation import describe, metrics_of_ranks, place_test_items
from evidence import write_report
from loading import load_model, restore_rounding
from neumf_int8 import IntegerNeuMF
from processes import Processes
from scoring import Scorer, float_scorer

log = logging.getLogger("ncf")


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
        recording.write_ranks(directory, places.ranks)
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
        checkpoint = load_checkpoint(directory / recording.BEST)
        needed = ("state_dict", "quantization_aware", "epoch", "config", "data_digest")
        checkpoint = {key: checkpoint[key] for key in needed}
    checkpoint = processes.agree(checkpoint)
    model = load_model(args, recording.BEST, checkpoint, split)
    if checkpoint["quantization_aware"] is not None:
        restore_rounding(model, checkpoint, args)
    scorer = float_scorer(model.to(device))
    origin = {"checkpoint": str(directory / recording.BEST), "computed": "fp32"} if processes.first else {}
    origin |= training_of(checkpoint)
    title = f"Test, by epoch {checkpoint['epoch']}:"
    evaluate_scorer(args, scorer, split, device, processes, directory, origin, title)


def warn_of_validation_items(checkpoint: dict[str, Any] | None, path: str | Path | None) -> None:
    """Warn where training goes on from a model that has seen what it is to be validated by."""
    config = checkpoint.get("config") if checkpoint else None
    if checkpoint and not (isinstance(config, dict) and config.get("validate")):
        log.warning("--validate: %s was trained on the items that it is validated by from here on", path)


def computation(args: Namespace, quantized: bool, scorer: Scorer) -> str:
    """What a model was computed in, for a report."""
    if quantized:
        return "integers" if isinstance(scorer, IntegerNeuMF) else "integers simulated in floats"
    return "fp16" if args.eval_fp16 else args.precision or "fp32"


def training_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The seed that a checkpoint says it was trained from, and whether with ``--validate``; None where it does not."""
    config = checkpoint.get("config")
    config = config if isinstance(config, dict) else {}
    return {"seed": config.get("seed"), "validate": config.get("validate")}
