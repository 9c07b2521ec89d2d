"""What settings can be, and what excludes what: the one place where that is said and checked."""

from __future__ import annotations

import math
from pathlib import Path

from distiller.system.cli import InputError
from neural_cf.model import check_sizes, has_both_branches
from neural_cf.ranking.candidates import nb_ranked
from neural_cf.runs.processes import Processes
from neural_cf.runs.settings import Mode, Settings
from neural_cf.split import Split

# Far beyond any use, and short of what takes all memory before anything can be said of it.
MAX_SIZE, MAX_WIDTH, MAX_NEGATIVE_SAMPLES = 1 << 31, 1 << 16, 1000
# The flags that ask for something else than training, as errors name them.
MODE_FLAGS = {
    Mode.CALIBRATE: "--qe-calibration",
    Mode.HISTOGRAM: "--activation-histograms",
    Mode.AUTO: "--qe-auto",
}
# Settings of training alone.
OF_TRAINING = (
    *(
        "resume",
        "overwrite",
        "reset_optimizer",
        "max_steps",
        "save_every",
        "threshold",
        "patience",
        "compress",
    ),
    *("param_hist", "validate", "pretrain", "l2"),
)


def check_settings(settings: Settings) -> None:
    """Raise an ``InputError`` for a setting that is out of its range or that another one leaves without effect."""
    _check_numbers(settings)
    check_sizes(1, 1, settings.factors, list(settings.layers), settings.split_final)
    _check_mode(settings)
    _check_continuation(settings)
    _check_precision(settings)
    _check_ranking(settings)
    _check_report(settings)
    _check_branches(settings)
    _check_quantization(settings)
    _check_calibration(settings)


def check_with_data(settings: Settings, split: Split, processes: Processes) -> None:
    """Raise an ``InputError`` for settings that this split, or this number of processes, cannot have."""
    candidates = nb_ranked(split, settings.ranking)
    if max(settings.cutoffs) > candidates:
        raise InputError(f"-k/--topk: {max(settings.cutoffs)} of a list of only {candidates} candidates")
    if processes.world_size == 1:
        return
    for flag, given in (
        ("--qe-calibration", settings.qe_calibration),
        ("--act-hist", settings.activation_histograms),
        ("--qe-auto", settings.qe_auto),
        ("--qe-report", settings.qe_report),
    ):
        if given:
            raise InputError(f"{flag}: torchrun's processes share training and evaluation, not this")
    if settings.batch_size < processes.world_size:
        raise InputError(
            f"-b/--batch-size: {settings.batch_size} samples for {processes.world_size} processes"
        )


def _check_numbers(settings: Settings) -> None:
    pretrain = settings.pretrain or ()
    for flag, values, least, greatest in (
        ("-e/--epochs", [settings.epochs], 1, MAX_SIZE),
        ("-b/--batch-size", [settings.batch_size], 1, MAX_SIZE),
        ("-f/--factors", [settings.factors], 0, MAX_WIDTH),
        ("--layers", [max(settings.layers)], 0, MAX_WIDTH),
        ("--pretrain", pretrain, 1, MAX_SIZE),
        ("-n/--negative-samples", [settings.negative_samples], 1, MAX_NEGATIVE_SAMPLES),
        ("-k/--topk", settings.cutoffs, 1, MAX_SIZE),
        ("-p/--threads/--processes", [settings.threads], 1, MAX_SIZE),
        ("--patience", [settings.patience], 1, MAX_SIZE),
        ("--max-steps", [settings.max_steps], 1, MAX_SIZE),
        ("--save-every", [settings.save_every], 1, MAX_SIZE),
        ("--log-freq", [settings.log_freq], 1, MAX_SIZE),
        ("-s/--seed", [settings.seed], 0, (1 << 63) - 1),
        ("--qe-max-loss", [settings.qe_max_loss], 0, 100),
    ):
        for value in values:
            if value is not None and not least <= value <= greatest:
                raise InputError(f"{flag} must be from {least} to {greatest}, not {value}")
    for flag, value in (
        ("-l/--learning-rate", settings.learning_rate),
        ("--pretrain-rate", settings.pretrain_rate),
    ):
        if not 0 < value < math.inf:
            raise InputError(f"{flag} must be above 0, not {value}")
    if not 0 <= settings.l2 < math.inf:
        raise InputError(f"--l2 must be at least 0, not {settings.l2}")
    for flag, value in (
        ("-t/--threshold", settings.threshold),
        ("--qe-calibration", settings.qe_calibration),
        ("--activation-histograms", settings.activation_histograms),
        ("--qe-report", settings.qe_report),
    ):
        if value is not None and not 0 < value <= 1:
            raise InputError(f"{flag} must be above 0 and at most 1, not {value}")
    if len(set(settings.cutoffs)) < len(settings.cutoffs):
        raise InputError(f"-k/--topk: {' '.join(map(str, settings.cutoffs))} has a number twice")


def _flags_of_modes(settings: Settings) -> list[str]:
    """Return the flags that ask for something else than training, one for each such mode."""
    asked = [
        (MODE_FLAGS[Mode.CALIBRATE], settings.qe_calibration),
        (MODE_FLAGS[Mode.HISTOGRAM], settings.activation_histograms),
        (MODE_FLAGS[Mode.AUTO], settings.qe_auto),
    ]
    evaluations = [
        ("--quantize-eval", settings.quantize_eval),
        ("--eval-fp16", settings.eval_fp16),
        ("--evaluate", settings.evaluate),
    ]
    return [flag for flag, given in asked if given] + [flag for flag, given in evaluations if given][:1]


def _check_mode(settings: Settings) -> None:
    asked = _flags_of_modes(settings)
    if len(asked) > 1:
        raise InputError(f"{asked[0]} and {asked[1]} exclude each other")
    if settings.eval_fp16 and settings.quantize_eval:
        raise InputError("--eval-fp16 and --quantize-eval exclude each other")
    if not asked:
        return
    if not settings.load:
        raise InputError(f"{asked[0]} needs --load: a checkpoint")
    for name in OF_TRAINING:
        if name in settings.given:
            raise InputError(f"{_flag(name)} is for training, which {asked[0]} does not do")


def _check_continuation(settings: Settings) -> None:
    if settings.resume and (settings.load or settings.overwrite):
        raise InputError(f"--resume and {'--load' if settings.load else '--overwrite'} exclude each other")
    if settings.reset_optimizer and not settings.load:
        raise InputError("--reset-optimizer needs --load: a checkpoint")


def _check_precision(settings: Settings) -> None:
    if "precision" not in settings.given:
        return
    for flag, given in (
        ("--quantize-eval", settings.quantize_eval),
        ("--eval-fp16", settings.eval_fp16),
        *((flag, settings.mode is mode) for mode, flag in MODE_FLAGS.items()),
    ):
        if given:
            raise InputError(f"--precision and {flag} exclude each other")


def _check_ranking(settings: Settings) -> None:
    if settings.ranking == "sampled":
        return
    for flag, given in (
        ("--qe-auto", settings.qe_auto),
        ("--qe-report", settings.qe_report),
        ("--qe-calibration", settings.qe_calibration),
        ("--act-hist", settings.activation_histograms),
    ):
        if given:
            raise InputError(f"--ranking {settings.ranking}: {flag} looks at the sampled candidates")


def _check_report(settings: Settings) -> None:
    if settings.report is None:
        return
    tests = settings.mode is Mode.EVALUATE or (settings.mode is Mode.TRAIN and settings.validate)
    if not tests:
        raise InputError("--report needs --evaluate, --quantize-eval, --eval-fp16 or --validate")
    if settings.report.suffix != ".json":
        raise InputError(
            f"--report: {settings.report} does not end in .json; the users' file beside it ends in .npz"
        )
    _check_is_file("--report", settings.report)


def _check_branches(settings: Settings) -> None:
    if "pretrain_rate" in settings.given and not settings.pretrain:
        raise InputError("--pretrain-rate needs --pretrain")
    if not settings.pretrain:
        return
    if len(settings.pretrain) > 2:
        raise InputError(f"--pretrain: {' '.join(map(str, settings.pretrain))}: there are two branches")
    if settings.load:
        raise InputError("--pretrain and --load exclude each other")
    if not has_both_branches(settings.factors, list(settings.layers)):
        raise InputError("--pretrain needs both branches: -f/--factors and --layers above 0")


def _check_quantization(settings: Settings) -> None:
    if settings.qe_convert_pytorch and "qe_engine" in settings.given and settings.qe_engine != "integer":
        raise InputError(f"--qe-convert-pytorch asks for integers, --qe-engine for {settings.qe_engine}")
    # A quantized model is evaluated without being quantized again.
    engine = {"qe_engine", "qe_convert_pytorch"} if settings.evaluate else set()
    beside = {"qe_stats_out", "qe_calibration", "qe_auto", "qe_max_loss"} | engine
    alone = sorted(name for name in settings.given - beside if name.startswith("qe_"))
    if alone and not settings.quantize_eval:
        raise InputError(f"{_flag(alone[0])} needs --quantize-eval")
    sources = [
        _flag(name)
        for name in ("qe_stats_file", "qe_dynamic", "qe_calibration", "qe_config_file")
        if getattr(settings, name)
    ]
    if len(sources) > 1:
        raise InputError(f"{sources[0]} and {sources[1]} exclude each other")
    if "qe_max_loss" in settings.given and not settings.qe_auto:
        raise InputError("--qe-max-loss needs --qe-auto")
    if settings.qe_auto and "split_final" in settings.given:
        raise InputError("--split-final: --qe-auto chooses whether to split the final layer")


def _check_calibration(settings: Settings) -> None:
    if settings.qe_stats_out:
        if not settings.qe_calibration:
            raise InputError("--qe-stats-out needs --qe-calibration")
        _check_is_file("--qe-stats-out", Path(settings.qe_stats_out))
    calibrates = settings.qe_calibration or settings.activation_histograms or settings.qe_report
    if "calibrate_on" in settings.given and not calibrates:
        raise InputError("--calibrate-on needs --qe-calibration, --activation-histograms or --qe-report")


def _check_is_file(flag: str, path: Path) -> None:
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{flag}: {path} is not a file in a directory")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
