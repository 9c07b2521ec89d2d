"""``neural-cf auto`` and ``ncf.py --qe-auto``: choose how to quantize, leave that as files, and report it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from distiller.calibration import CALIBRATED_STATS_FILE, collect_quant_stats
from distiller.quantization.saved import save_config
from distiller.quantization.statistics import save_statistics
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.flags import add_budget, add_cutoffs, add_load, add_run_flags, add_seed, new_parser
from neural_cf.commands.start import started
from neural_cf.int8.scorer import quantized_scorer
from neural_cf.int8.search import Chooser, Setting, calibration_lists, nb_calibration_users
from neural_cf.model import NeuMF, sizes_from_state_dict, split_final_layer
from neural_cf.ranking.candidates import score_all
from neural_cf.ranking.metrics import metrics_of_ranks
from neural_cf.ranking.places import rank_test_items
from neural_cf.ranking.scorers import float_scorer
from neural_cf.runs.directory import AUTO, write_quantized, write_ranks
from neural_cf.runs.log import start_log
from neural_cf.runs.models import load_float, training_of
from neural_cf.runs.run import Run

PROG = "neural-cf auto"

log = logging.getLogger("ncf")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    parser = new_parser(
        PROG,
        "Choose the cheapest quantization within a loss by a fifth of the users, report it on the others,\n"
        "and write it as a --qe-config-file.",
    )
    parser.set_defaults(qe_auto=True)
    add = parser.add_argument_group("Choice").add_argument
    add_load(add, "float checkpoint, best.pth.tar")
    add_budget(add)
    add_cutoffs(add)
    add_seed(add)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    settings = parse_settings(argv, parser)
    with started(settings, PROG) as run:
        choose_quantization(run)


def choose_quantization(run: Run) -> None:
    """Choose how to quantize by some users, leave that as files, and report it on the others."""
    settings, split = run.settings, run.split
    model = load_float(settings, settings.load, load_checkpoint(settings.load), split)
    if nb_calibration_users(split) == split.nb_users:
        raise InputError(
            f"--qe-auto: {settings.data} has too few users to choose by some and report on others"
        )
    start_log(run.directory, run.device)
    chooser = build_chooser(run, model.eval().to(run.device))
    log.info("Chosen by %d users. In float: %s", nb_calibration_users(split), chooser.in_float)
    trials = []
    for trial in chooser.choose(settings.qe_max_loss):
        log.info("%s", trial)
        trials.append(trial)
    best = min(trials, key=lambda trial: max(trial.loss, settings.qe_max_loss))
    if best.loss > settings.qe_max_loss:
        log.warning("--qe-max-loss %g: all that was tried loses more; this loses least", settings.qe_max_loss)
    log.info("Chosen: %s", best.setting.name)
    leave_choice(run, chooser, best.setting)
    report_choice(run, chooser, best.setting)


def build_chooser(run: Run, model: NeuMF) -> Chooser:
    """Return what tries settings on the calibration users, with statistics of their candidates alone."""
    split = run.split
    sizes = sizes_from_state_dict(model.state_dict())
    models = {False: model, True: NeuMF(**sizes | {"split_final": True}).eval().to(run.device)}
    models[True].load_state_dict(split_final_layer(model.state_dict()))
    calibrate_on = partial(score_all, split=split, nb_users=nb_calibration_users(split), device=run.device)
    statistics = {
        split_final: collect_quant_stats(model, calibrate_on, rows_per_batch=split.nb_candidates)
        for split_final, model in models.items()
    }
    lists = calibration_lists(split, run.settings.seed)
    return Chooser(models, statistics, lists, run.settings.k, run.device)


def leave_choice(run: Run, chooser: Chooser, setting: Setting) -> None:
    """Leave in the run's directory a chosen setting, its statistics, and the model quantized by it."""
    directory, load = run.directory, run.settings.load
    quantizer = chooser.quantizer(setting)
    statistics = directory / CALIBRATED_STATS_FILE
    save_statistics(chooser.statistics[setting.split_final], statistics)
    save_config(quantizer, statistics, directory / AUTO, split_final=setting.split_final)
    quantizer.save(directory)
    write_quantized(directory, quantizer, load, training_of(load_checkpoint(load)), run.split)
    log.info("The same again: --evaluate --quantize-eval --qe-config-file %s", directory / AUTO)


def report_choice(run: Run, chooser: Chooser, setting: Setting) -> None:
    """Print the metrics of those users that the setting was not chosen by, in float and quantized."""
    split, k = run.split, run.settings.k
    first = nb_calibration_users(split)
    scorers = {
        "in float": float_scorer(chooser.models[False]),
        "quantized": quantized_scorer(chooser.quantizer(setting)),
    }
    for name, scorer in scorers.items():
        ranks = rank_test_items(scorer, split, k, chooser.device)
        metrics = metrics_of_ranks(ranks[first:], k)
        log.info("The other %d users, %s: %s", split.nb_users - first, name, metrics)
    write_ranks(run.directory, ranks)
