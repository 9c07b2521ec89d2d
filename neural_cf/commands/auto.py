"""``ncf.py --qe-auto``: choose how to quantize, leave that as files, and report it."""

from __future__ import annotations

import logging
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from distiller.calibration import STATS_FILE, collect_quant_stats
from distiller.quantization.saved import save_config
from distiller.quantization.statistics import save_statistics
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.int8.search import Chooser, Setting, calibration_lists, nb_calibration_users
from neural_cf.model import NeuMF, sizes_from_state_dict, split_final_layer
from neural_cf.ranking.candidates import score_all
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import float_scorer
from neural_cf.runs.directory import AUTO, write_quantized, write_ranks
from neural_cf.runs.log import start_log
from neural_cf.runs.models import load_model, training_of
from neural_cf.split import Split

log = logging.getLogger("ncf")


def choose_quantization(args: Namespace, split: Split, device: torch.device, directory: Path) -> None:
    """Choose how to quantize by some users, leave that as files, and report it on the others."""
    model = load_model(args, args.load, load_checkpoint(args.load), split)
    if nb_calibration_users(split) == split.nb_users:
        raise InputError(f"--qe-auto: {args.data} has too few users to choose by some and report on others")
    start_log(directory, device)
    chooser = build_chooser(args, model.eval().to(device), split, device)
    log.info("Chosen by %d users. In float: %s", nb_calibration_users(split), chooser.in_float)
    trials = []
    for trial in chooser.choose(args.qe_max_loss):
        log.info("%s", trial)
        trials.append(trial)
    best = min(trials, key=lambda trial: max(trial.loss, args.qe_max_loss))
    if best.loss > args.qe_max_loss:
        log.warning("--qe-max-loss %g: all that was tried loses more; this loses least", args.qe_max_loss)
    log.info("Chosen: %s", best.setting.name)
    leave_choice(args, chooser, best.setting, split, directory)
    report_choice(args, chooser, best.setting, split, directory)


def build_chooser(args: Namespace, model: NeuMF, split: Split, device: torch.device) -> Chooser:
    """What tries settings on the calibration users, with statistics of their candidates alone."""
    sizes = sizes_from_state_dict(model.state_dict())
    models = {False: model, True: NeuMF(**sizes | {"split_final": True}).eval().to(device)}
    models[True].load_state_dict(split_final_layer(model.state_dict()))
    calibrate_on = partial(score_all, split=split, nb_users=nb_calibration_users(split), device=device)
    statistics = {
        split_final: collect_quant_stats(model, calibrate_on, rows_per_batch=split.nb_candidates)
        for split_final, model in models.items()
    }
    return Chooser(models, statistics, calibration_lists(split, args.seed), args.topk, device)


def leave_choice(args: Namespace, chooser: Chooser, setting: Setting, split: Split, directory: Path) -> None:
    """Leave in the run's directory a chosen setting, its statistics, and the model quantized by it."""
    quantizer = chooser.quantizer(setting)
    save_statistics(chooser.statistics[setting.split_final], directory / STATS_FILE)
    save_config(quantizer, directory / STATS_FILE, directory / AUTO, split_final=setting.split_final)
    quantizer.save(directory)
    write_quantized(directory, quantizer, args.load, training_of(load_checkpoint(args.load)), split)
    log.info("The same again: --evaluate --quantize-eval --qe-config-file %s", directory / AUTO)


def report_choice(args: Namespace, chooser: Chooser, setting: Setting, split: Split, directory: Path) -> None:
    """Print the metrics of those users that the setting was not chosen by, in float and quantized."""
    first = nb_calibration_users(split)
    scorers = {
        "in float": float_scorer(chooser.models[False]),
        "quantized": quantized_scorer(chooser.quantizer(setting)),
    }
    for name, scorer in scorers.items():
        ranks = rank_test_items(scorer, split, args.topk, chooser.device)
        metrics = metrics_of_ranks(ranks[first:], args.topk)
        log.info("The other %d users, %s: %s", split.nb_users - first, name, metrics)
    write_ranks(directory, ranks)
