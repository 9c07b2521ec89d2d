"""``ncf.py --qe-calibration`` and ``--activation-histograms``: statistics of activations."""

from __future__ import annotations

import logging
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

import recording
from dataset import Split
from distiller.calibration import STATS_FILE, TestFunction, collect_quant_stats
from distiller.checkpoint import load_checkpoint
from distiller.cli import InputError
from distiller.files import file_digest
from distiller.quantization.statistics import save_statistics
from evaluation import first_users, score_all
from loading import load_model
from sampling import TrainingBatches
from training import score_training_pairs

log = logging.getLogger("ncf")


def calibration_pass(args: Namespace, split: Split, device: torch.device, share: float) -> TestFunction:
    """What scores ``share`` of the data asked for, in batches of as many pairs as a user has candidates."""
    if args.calibrate_on == "train":
        batches = TrainingBatches(split, split.nb_candidates, args.negative_samples, args.seed, device)
        if batches.nb_samples < split.nb_candidates:
            raise InputError(
                f"--calibrate-on train: {batches.nb_samples} training pairs are fewer than one user's "
                f"{split.nb_candidates} candidates, which a batch is to be of"
            )
        return partial(score_training_pairs, batches=batches, share=share)
    return partial(score_all, split=split, nb_users=first_users(split, share), device=device)


def calibrate(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Collect statistics of activations for ``--qe-stats-file``."""
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.qe_calibration)
    recording.start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    comment = "\n".join(
        [
            "Statistics of activations, for --qe-stats-file. Made by",
            f"    {recording.command_line()}",
            f"data: {split.digest}",
            f"checkpoint: {file_digest(args.load)}",
        ]
    )
    for path in filter(None, [directory / STATS_FILE, args.qe_stats_out]):
        save_statistics(statistics, path, comment)
        log.info("Statistics of %d layers written to %s", len(statistics), path)


def draw_activation_histograms(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Histograms of every layer's output, to TensorBoard and as pictures."""
    recording.require_matplotlib("--activation-histograms")
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    test_fn = calibration_pass(args, split, device, args.activation_histograms)
    recording.start_log(directory, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=split.nb_candidates)
    with recording.Recorder(directory, pictures=True) as recorder:
        recorder.activations(statistics)
    log.info("Histograms of %d layers written to %s", len(statistics), directory)
