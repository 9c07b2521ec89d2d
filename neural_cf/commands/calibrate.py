"""``ncf.py --qe-calibration`` and ``--activation-histograms``: statistics of activations."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import torch

from distiller.calibration import STATS_FILE, collect_quant_stats
from distiller.quantization.statistics import save_statistics
from distiller.system.files import file_digest
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.int8.calibration import calibration_pass
from neural_cf.runs.log import command_line, start_log
from neural_cf.runs.models import load_model
from neural_cf.runs.recorder import Recorder, require_matplotlib
from neural_cf.split import Split

log = logging.getLogger("ncf")


def calibrate(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Collect statistics of activations for ``--qe-stats-file``."""
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.qe_calibration)
    start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    comment = "\n".join(
        [
            "Statistics of activations, for --qe-stats-file. Made by",
            f"    {command_line()}",
            f"data: {split.digest}",
            f"checkpoint: {file_digest(args.load)}",
        ]
    )
    for path in filter(None, [directory / STATS_FILE, args.qe_stats_out]):
        save_statistics(statistics, path, comment)
        log.info("Statistics of %d layers written to %s", len(statistics), path)


def draw_activation_histograms(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Histograms of every layer's output, to TensorBoard and as pictures."""
    require_matplotlib("--activation-histograms")
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.activation_histograms)
    start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    with Recorder(directory, pictures=True) as recorder:
        recorder.activations(statistics)
    log.info("Histograms of %d layers written to %s", len(statistics), directory)
