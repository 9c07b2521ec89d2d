"""Train NeuMF on a MovieLens split, calibrate it, quantize it after training, evaluate it."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import neumf
import recording
from dataset import Split, TrainingBatches, load_split
from distiller.calibration import STATS_FILE, TestFunction, collect_histograms, collect_quant_stats
from distiller.checkpoint import load_checkpoint
from distiller.cli import ArgumentParser, InputError, run
from distiller.files import file_digest
from distiller.quantization import PostTrainLinearQuantizer, add_post_train_quant_args
from distiller.quantization.arguments import portion
from distiller.quantization.statistics import foreign_statistics, save_statistics
from distiller.quantization.train_aware import without_ranges
from distiller.schedule import CompressionSchedule, load_schedule, prepare_quantization_aware
from evaluation import evaluate, score_all, users_per_block
from neumf import NeuMF
from training import Progress, Stop, Trainer, score_training_pairs

PROG = "ncf.py"
DEFAULT_FACTORS, DEFAULT_LAYERS = 8, [64, 32, 16, 8]  # the original's
# What a resumed run does not take over from the settings it began with.
OF_EACH_START = {"data", "out_dir", "resume", "overwrite", "load", "reset_optimizer", "max_steps"}

log = logging.getLogger("ncf")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("data", type=Path, help="directory of the split, written by convert.py")
    add("-e", "--epochs", type=int, default=20, metavar="N", help="epochs to train (default: %(default)s)")
    add(
        "-b", "--batch-size", type=int, default=256, metavar="N", help="samples a step (default: %(default)s)"
    )
    add(
        "-f",
        "--factors",
        type=int,
        metavar="N",
        help=f"factors of the matrix factorization (default: the checkpoint's, else {DEFAULT_FACTORS})",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="MLP layer sizes, that of [user, item] first "
        f"(default: the checkpoint's, else {' '.join(map(str, DEFAULT_LAYERS))})",
    )
    add(
        "-n",
        "--negative-samples",
        type=int,
        default=4,
        metavar="N",
        help="negatives drawn for each training positive (default: %(default)s)",
    )
    add(
        "-l",
        "--learning-rate",
        type=float,
        default=0.001,
        metavar="RATE",
        help="of Adam (default: %(default)s)",
    )
    add("-k", "--topk", type=int, default=10, metavar="K", help="of HR@K and NDCG@K (default: %(default)s)")
    add("--no-cuda", action="store_true", help="use the CPU even where there is a GPU")
    add("--gpus", type=int, metavar="ID", help="number of the GPU to use (default: 0, where there is one)")
    add("-s", "--seed", type=int, help="of initial weights and of samples (default: drawn, and recorded)")
    add("-t", "--threshold", type=float, metavar="HR", help="stop training once HR@K reaches this")
    add(
        "-p",
        "--processes",
        type=int,
        metavar="N",
        help="processor threads, at most one per processor (default: PyTorch's choice). "
        "Scoring is vectorised over users: there are no processes to share it",
    )
    add(
        "-w",
        "--workers",
        type=int,
        metavar="N",
        help="accepted, for old command lines. Batches are drawn as whole tensors: there are no loader workers",
    )
    add("--load", metavar="FILE", help="checkpoint to evaluate, to calibrate, or to go on training from")
    add("--reset-optimizer", action="store_true", help="with --load: a fresh optimizer, and epochs from 0")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in -o, with its settings where none are given",
    )
    add("--overwrite", action="store_true", help="train in -o although it holds a run; that run is lost")
    add("--max-steps", type=int, metavar="N", help="stop training after N steps, evaluate and save")
    add("--eval", "--evaluate", dest="evaluate", action="store_true", help="evaluate; no training")
    add("--compress", metavar="FILE", help="YAML of quantization-aware training and learning-rate schedules")
    add("--eval-fp16", action="store_true", help="evaluate in half precision; no training")
    add(
        "-o",
        "--out-dir",
        metavar="DIR",
        help=f"the run's directory (default: a fresh one in {recording.RUNS})",
    )
    add("--name", help="stands before the date in the name of a fresh directory")
    add(
        "--log-freq",
        "--lf",
        type=int,
        default=100,
        metavar="N",
        help="steps between updates of progress bar and TensorBoard (default: %(default)s)",
    )
    add(
        "--param-hist",
        action="store_true",
        help="every epoch, histograms of weights: TensorBoard and pictures",
    )
    add(
        "--activation-histograms",
        "--act-hist",
        type=portion,
        metavar="PORTION",
        help="histograms of activations on this share of the data: TensorBoard and pictures; no training",
    )
    add("--split-final", "--sf", action="store_true", help="a final layer per branch, and their sum")
    add("--qe-stats-out", metavar="PATH", help="where else --qe-calibration writes its statistics")
    add(
        "--calibrate-on",
        choices=["test", "train"],
        default="test",
        help="calibrate on the first test users' candidates, or on training pairs, so that nothing of the test set "
        "is used (default: %(default)s)",
    )
    add_post_train_quant_args(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags; with ``--resume``, those not given are the run's own."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume:
        saved = {key: value for key, value in read_config(args).items() if key not in OF_EACH_START}
        args = parser.parse_args(argv, Namespace(**saved))
    check_args(args)
    if args.seed is None:
        args.seed = secrets.randbelow(1 << 32)
    return args


def read_config(args: Namespace) -> dict[str, Any]:
    """The settings of the run to go on with."""
    if args.out_dir is None:
        raise InputError("--resume needs -o/--out-dir: the run to go on with")
    directory = Path(args.out_dir)
    if not all((directory / name).is_file() for name in (recording.CHECKPOINT, recording.CONFIG)):
        raise InputError(f"--resume: {directory} holds no run to go on with")
    try:
        return dict(json.loads((directory / recording.CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"--resume: {directory / recording.CONFIG}: {error}") from error


def check_args(args: Namespace) -> None:
    """Raise an ``InputError`` for flags out of range, or at odds with each other."""
    for flag, value, least in (
        ("-e/--epochs", args.epochs, 1),
        ("-b/--batch-size", args.batch_size, 1),
        ("-n/--negative-samples", args.negative_samples, 1),
        ("-k/--topk", args.topk, 1),
        ("-p/--processes", args.processes, 1),
        ("--max-steps", args.max_steps, 1),
        ("--log-freq", args.log_freq, 1),
        ("-s/--seed", args.seed, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} must be at least {least}, not {value}")
    if args.seed is not None and args.seed >= 1 << 63:
        raise InputError(f"-s/--seed must be below 2^63, not {args.seed}")
    if not 0 < args.learning_rate < math.inf:
        raise InputError(f"-l/--learning-rate must be above 0, not {args.learning_rate}")
    factors = DEFAULT_FACTORS if args.factors is None else args.factors
    neumf.check_sizes(1, 1, factors, args.layers or DEFAULT_LAYERS)
    needs_load = {
        "--evaluate": args.evaluate,
        "--quantize-eval": args.quantize_eval,
        "--eval-fp16": args.eval_fp16,
        "--qe-calibration": args.qe_calibration,
        "--activation-histograms": args.activation_histograms,
        "--reset-optimizer": args.reset_optimizer,
    }
    for flag, given in needs_load.items():
        if given and not args.load:
            raise InputError(f"{flag} needs --load: a checkpoint")
    if args.resume and (args.load or args.overwrite):
        raise InputError(f"--resume and {'--load' if args.load else '--overwrite'} exclude each other")
    if args.eval_fp16 and args.quantize_eval:
        raise InputError("--eval-fp16 and --quantize-eval exclude each other")
    source = args.qe_stats_file or args.qe_config_file or args.qe_dynamic
    if args.quantize_eval and not source and args.qe_bits_acts:
        raise InputError("--quantize-eval needs --qe-stats-file, --qe-dynamic or --qe-config-file")
    if source and not args.quantize_eval:
        raise InputError("--qe-stats-file, --qe-dynamic and --qe-config-file need --quantize-eval")
    if args.qe_stats_out and not args.qe_calibration:
        raise InputError("--qe-stats-out needs --qe-calibration")
    if args.qe_stats_out and (
        not Path(args.qe_stats_out).parent.is_dir() or Path(args.qe_stats_out).is_dir()
    ):
        raise InputError(f"--qe-stats-out: {args.qe_stats_out} is not a file in a directory")


def choose_device(args: Namespace) -> torch.device:
    """The GPU asked for, else the first one, else the CPU."""
    if args.gpus is None:
        return torch.device("cuda:0" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    if args.no_cuda:
        raise InputError("--gpus and --no-cuda exclude each other")
    if args.gpus not in range(torch.cuda.device_count()):
        raise InputError(f"--gpus: there is no GPU {args.gpus}: PyTorch finds {torch.cuda.device_count()}")
    return torch.device("cuda", args.gpus)


def load_model(args: Namespace, path: str | Path, split: Split) -> tuple[NeuMF, dict[str, Any]]:
    """The model of a checkpoint, its final layer as the flags have it, and the checkpoint.

    Raises:
        InputError: no checkpoint of a NeuMF, or its sizes are not the data's or the flags'.
    """
    checkpoint = load_checkpoint(path)
    weights = without_ranges(checkpoint["state_dict"])
    try:
        sizes = neumf.sizes_from_state_dict(weights)
    except InputError as error:
        raise InputError(f"--load: {path}: {error}") from error
    if (sizes["nb_users"], sizes["nb_items"]) != (split.nb_users, split.nb_items):
        raise InputError(
            f"--load: {path} has {sizes['nb_users']} users and {sizes['nb_items']} items, "
            f"{args.data} has {split.nb_users} and {split.nb_items}"
        )
    for flag, given, size in (
        ("-f/--factors", args.factors, sizes["mf_dim"]),
        ("--layers", args.layers, sizes["mlp_layer_sizes"]),
    ):
        if given not in (None, size):
            raise InputError(f"{flag}: {given} asked for, but {path} has {size}")
    model = NeuMF(**sizes | {"split_final": args.split_final})
    model.load_state_dict(neumf.with_final_layer(weights, args.split_final))
    return model, checkpoint


def restore_rounding(model: NeuMF, checkpoint: dict[str, Any], args: Namespace) -> None:
    """Make the model of a quantization-aware checkpoint round as it did in training, with the ranges it had."""
    if neumf.is_split(checkpoint["state_dict"]) != args.split_final:
        raise InputError(
            "--split-final: the checkpoint's ranges are those of its final layer as it was trained"
        )
    prepare_quantization_aware(model, checkpoint["quantization_aware"])
    model.load_state_dict(checkpoint["state_dict"])


def train(args: Namespace, split: Split, device: torch.device) -> None:
    """Train, from new weights, from ``--load``, or from where the run to resume stands."""
    start = check_start(args)
    if args.param_hist:
        recording.require_matplotlib("--param-hist")
    schedule = load_schedule(args.compress) if args.compress else CompressionSchedule()
    model, checkpoint = initial_model(args, start, split, schedule)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    schedule.bind(optimizer)
    progress = Progress()
    if checkpoint and not args.reset_optimizer:
        progress = restore(optimizer, schedule, checkpoint, args, start)
    if progress.epoch >= args.epochs:
        raise InputError(f"-e/--epochs: {start} already has {progress.epoch} epochs, {args.epochs} asked for")

    directory = recording.open_run_directory(args.out_dir, args.name, device)
    if not args.resume:
        recording.clear_run(directory)
    config = resolved_config(args, split, device, model)
    recording.write_config(directory, config)
    trainer = Trainer(
        model,
        optimizer,
        TrainingBatches(split, args.batch_size, args.negative_samples, args.seed, device),
        split,
        recording.Recorder(directory, pictures=args.param_hist),
        config,
        k=args.topk,
        schedule=schedule,
        log_freq=args.log_freq,
        device=device,
        progress=progress,
    )
    trainer.run(Stop(args.epochs, args.max_steps, args.threshold))


def check_start(args: Namespace) -> str | Path | None:
    """The checkpoint that training starts from; an ``InputError`` where it would overwrite a run unasked."""
    if args.out_dir is None:
        return args.load
    checkpoint = Path(args.out_dir) / recording.CHECKPOINT
    if checkpoint.exists() and not (args.resume or args.overwrite):
        raise InputError(
            f"-o/--out-dir: {args.out_dir} holds a run: --resume goes on with it, --overwrite starts again"
        )
    return checkpoint if args.resume else args.load


def initial_model(
    args: Namespace, start: str | Path | None, split: Split, schedule: CompressionSchedule
) -> tuple[NeuMF, dict[str, Any] | None]:
    """The model that training starts with, and the checkpoint that it is from, if any."""
    torch.manual_seed(args.seed)
    if start is None:
        sizes = (args.factors or DEFAULT_FACTORS, args.layers or DEFAULT_LAYERS)
        return NeuMF(split.nb_users, split.nb_items, *sizes, args.split_final), None
    model, checkpoint = load_model(args, start, split)
    if schedule.quantizer is not None and checkpoint.get("quantization_aware") == schedule.quantizer:
        restore_rounding(model, checkpoint, args)
    return model, checkpoint


def restore(
    optimizer: torch.optim.Optimizer,
    schedule: CompressionSchedule,
    checkpoint: dict[str, Any],
    args: Namespace,
    path: str | Path,
) -> Progress:
    """Put optimizer and schedule where the checkpoint left them; where training goes on from."""
    if neumf.is_split(checkpoint["state_dict"]) != args.split_final:
        raise InputError(
            f"--split-final: {path} has its final layer the other way, which its optimizer state cannot follow; "
            "--reset-optimizer starts without that state"
        )
    try:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        schedule.load_state_dict(checkpoint.get("schedule_state_dict", {}))
        epoch = int(checkpoint["epoch"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: no optimizer state to go on with ({type(error).__name__}: {error}); "
            "--reset-optimizer starts without one"
        ) from error
    if args.learning_rate != checkpoint.get("config", {}).get("learning_rate"):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
    if "progress" not in checkpoint:  # the original's, saved after a whole epoch
        return Progress(epoch=epoch + 1)
    progress = Progress(**checkpoint["progress"])
    for flag, key in (
        ("-b/--batch-size", "batch_size"),
        ("-n/--negative-samples", "negative_samples"),
        ("-s/--seed", "seed"),
    ):
        before, now = checkpoint["config"][key], getattr(args, key)
        if progress.step and before != now:
            raise InputError(
                f"{flag}: {path} stands within an epoch that began with {before}, and cannot go on with {now}; "
                "--reset-optimizer starts from epoch 0"
            )
    if not args.resume:
        progress.best_hr = Progress.best_hr  # the new run has no best.pth.tar yet
    return progress


def resolved_config(args: Namespace, split: Split, device: torch.device, model: NeuMF) -> dict[str, Any]:
    """Every setting as it was in the end: what ``config.json`` and checkpoints record."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    sizes = neumf.sizes_from_state_dict(without_ranges(model.state_dict()))
    return config | {
        "factors": sizes["mf_dim"],
        "layers": sizes["mlp_layer_sizes"],
        "nb_users": split.nb_users,
        "nb_items": split.nb_items,
        "data_digest": split.digest,
        "device": str(device),
        "torch": str(torch.__version__),
        "command": recording.command_line(),
    }


def calibration_pass(
    args: Namespace, split: Split, device: torch.device, share: float
) -> tuple[TestFunction, int]:
    """What scores ``share`` of the data asked for, and the number of rows that are one batch of statistics."""
    if args.calibrate_on == "train":
        batches = TrainingBatches(split, split.nb_candidates, args.negative_samples, args.seed, device)
        return partial(score_training_pairs, batches=batches, share=share), split.nb_candidates
    nb_users = max(1, round(share * split.nb_users))
    return partial(score_all, split=split, nb_users=nb_users, device=device), split.nb_candidates


def calibrate(args: Namespace, split: Split, device: torch.device) -> None:
    """Collect statistics of activations for ``--qe-stats-file``."""
    model, _ = load_model(args, args.load, split)
    test_fn, rows_per_batch = calibration_pass(args, split, device, args.qe_calibration)
    directory = recording.open_run_directory(args.out_dir, args.name, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=rows_per_batch)
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


def draw_activation_histograms(args: Namespace, split: Split, device: torch.device) -> None:
    """Histograms of every layer's output, to TensorBoard and as pictures."""
    recording.require_matplotlib("--activation-histograms")
    model, _ = load_model(args, args.load, split)
    test_fn, rows_per_batch = calibration_pass(args, split, device, args.activation_histograms)
    directory = recording.open_run_directory(args.out_dir, args.name, device)
    statistics = collect_quant_stats(model.to(device), test_fn, rows_per_batch=rows_per_batch)
    histograms = collect_histograms(model, test_fn, statistics)
    recording.Recorder(directory, pictures=True).activations(histograms)
    log.info("Histograms of %d layers written to %s", len(histograms), directory)


def evaluate_checkpoint(args: Namespace, split: Split, device: torch.device) -> None:
    """Evaluate in FP32, in half precision, or quantized."""
    model, checkpoint = load_model(args, args.load, split)
    if checkpoint.get("quantization_aware") and not args.quantize_eval:
        log.info("Evaluated as trained: quantization-aware, with rounded weights and activations")
        restore_rounding(model, checkpoint, args)
    model.to(device)
    block = users_per_block(split)
    quantizer = None
    if args.quantize_eval:
        quantizer = PostTrainLinearQuantizer.from_args(model, args)
        why = foreign_statistics(model, quantizer.statistics or {})
        if why:
            log.warning("--qe-stats-file seems to belong to another model: %s", why)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        quantizer.prepare_model((index, index, True))
        if quantizer.dynamic:
            block = 1  # as calibration has it, a batch is one user's candidates
    elif args.eval_fp16:
        model.half()
    directory = recording.open_run_directory(args.out_dir, args.name, device)
    if quantizer:
        quantizer.save(directory)
    start = time.perf_counter()
    metrics = evaluate(model, split, args.topk, block, device)
    log.info("Initial %s, val_time = %.2f", metrics, time.perf_counter() - start)


def main() -> None:
    recording.show_messages()
    args = parse_args()
    device = choose_device(args)
    if args.processes:
        torch.set_num_threads(min(args.processes, os.cpu_count()))
    split = load_split(args.data)
    if args.topk > split.nb_candidates:
        raise InputError(f"-k/--topk: {args.topk} of a list of only {split.nb_candidates} candidates")
    if args.qe_calibration:
        calibrate(args, split, device)
    elif args.activation_histograms:
        draw_activation_histograms(args, split, device)
    elif args.evaluate or args.quantize_eval or args.eval_fp16:
        evaluate_checkpoint(args, split, device)
    else:
        train(args, split, device)


if __name__ == "__main__":
    sys.exit(run(PROG, main))
