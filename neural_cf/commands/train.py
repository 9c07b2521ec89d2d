"""``ncf.py`` without ``--evaluate``: a training run as the flags ask, from its start to its end."""

from __future__ import annotations

import logging
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distiller.quantization.train_aware import without_ranges
from distiller.schedule import CompressionSchedule, load_schedule
from distiller.system.cli import InputError
from neural_cf.commands.evaluate import evaluate_best, warn_of_validation_items
from neural_cf.data.batches import TrainingBatches
from neural_cf.data.validation_split import validation_split
from neural_cf.model import NeuMF, sizes_from_state_dict
from neural_cf.ranking.metrics import describe
from neural_cf.runs.directory import (
    CHECKPOINT,
    RANKS,
    clear_run,
    drop_results_after,
    epochs_done,
    write_config,
)
from neural_cf.runs.hardware import choose_compilation, choose_precision
from neural_cf.runs.log import command_line, start_log
from neural_cf.runs.processes import Processes
from neural_cf.runs.recorder import Recorder, require_matplotlib
from neural_cf.split import Split
from neural_cf.training.lazy_adam import LazyAdam
from neural_cf.training.pretraining import BRANCHES, branch_args, train_branches
from neural_cf.training.starting_point import (
    bind,
    check_schedule,
    check_start,
    initial_model,
    meta_model,
    restore,
    restore_lagging,
)
from neural_cf.training.step import Step
from neural_cf.training.trainer import Progress, Stop, Trainer

log = logging.getLogger("ncf")


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
        steps: Taken.
        finished: Whether all epochs are done, or the threshold is reached.
    """

    steps: int
    finished: bool


def train_whole(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> None:
    """Train as the flags ask, the branches before the whole model; then evaluate what ``--validate`` chose."""
    if args.pretrain and not pretrain(args, split, device, processes, directory):
        return
    if is_to_be_tested(args):
        if processes.first:
            start_log(directory, device)
    elif not train(args, split, device, processes, directory).finished:
        return
    if args.validate:
        evaluate_best(args, split, device, processes, directory)


def is_to_be_tested(args: Namespace) -> bool:
    """Whether the run to resume was stopped after its last epoch and before ``--validate`` tested the best one."""
    if not (args.resume and args.validate):
        return False
    directory = Path(args.out_dir)
    return epochs_done(directory) >= args.epochs and not (directory / RANKS).exists()


def pretrain(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> bool:
    """Train both branches alone, or what is left of it in a run to resume; whether they are done."""
    if not args.resume:
        begin_pretraining(args, split, processes, directory)
    if args.resume and (Path(args.out_dir) / CHECKPOINT).exists():
        return True  # they have been joined
    train_branch = partial(train, split=split, device=device, processes=processes)
    if not train_branches(args, train_branch, processes.first):
        return False
    processes.agree(None)  # the first one has written what all read
    args.resume, args.overwrite = False, True  # the directory holds nothing but the settings
    return True


def begin_pretraining(args: Namespace, split: Split, processes: Processes, directory: Path | None) -> None:
    """Write a run's settings, for ``--resume`` before there is a checkpoint of the whole."""
    branches = [branch_args(args, branch) for branch in BRANCHES if args.out_dir]
    for part in (args, *branches):
        check_start(part, processes)
    check_schedule(schedule_of(args, processes), meta_model(args, split))
    processes.agree(None)  # no file changes before all have looked
    if directory is not None:
        for part in (directory, *(directory / branch for branch in BRANCHES)):
            clear_run(part)
        write_config(directory, settings(args))
        args.out_dir = str(directory)
    args.out_dir = processes.agree(args.out_dir)


def train(
    args: Namespace, split: Split, device: torch.device, processes: Processes, directory: Path | None
) -> Trained:
    """Train, from new weights, from joined branches, from ``--load``, or from where the run to resume stands."""
    start = check_start(args, processes)
    schedule = schedule_of(args, processes)
    args.precision = choose_precision(args, device, schedule)
    model, checkpoint = initial_model(args, start, split, schedule)
    optimizer = build_optimizer(args, model.to(device))
    progress = Progress()
    if checkpoint and not args.reset_optimizer:
        progress = restore(optimizer, checkpoint, split, args, start)
    bind(schedule, optimizer, checkpoint, args)
    if checkpoint and not args.reset_optimizer:
        restore_lagging(optimizer, checkpoint, start)
    if progress.epoch >= args.epochs:
        raise InputError(f"-e/--epochs: {start} already has {progress.epoch} epochs, {args.epochs} asked for")

    seen = split
    if args.validate:
        seen = validation_split(split, args.data)
        warn_of_validation_items(checkpoint, start)
    batches = TrainingBatches(seen, args.batch_size, args.negative_samples, args.seed, device, processes)
    if not 0 <= progress.step <= len(batches):
        raise InputError(f"{start}: step {progress.step} of an epoch of {len(batches)}")
    processes.agree(None)  # no file changes before all have read
    with open_recorder(args, device, directory, progress, batches) as recorder:
        compiled = choose_compilation(args, device)
        log.info(
            "Training with %s, %s matrix products, %s, on %s",
            *(args.optimizer, args.precision, "compiled" if compiled else "not compiled", device),
        )
        config = resolved_config(args, split, device, model) | {"compiled": compiled}
        if recorder is not None:
            write_config(recorder.directory, config)
        trainer = Trainer(
            Step(model, optimizer, args.precision, compiled, processes, args.l2),
            batches,
            seen,
            recorder,
            config,
            cutoffs=args.cutoffs,
            ranking=args.ranking,
            schedule=schedule,
            log_freq=args.log_freq,
            device=device,
            progress=progress,
            save_every=args.save_every or 0,
        )
        if args.pretrain and start is None:
            log.info("Joined: %s", describe(trainer.keep_start()))
        steps = trainer.run(Stop(args.epochs, args.max_steps, args.threshold))
        reached = args.threshold is not None and progress.best_hr >= args.threshold
        return Trained(steps, reached or progress.epoch >= args.epochs)


def schedule_of(args: Namespace, processes: Processes) -> CompressionSchedule:
    """What ``--compress`` asks for; an ``InputError`` for what these processes, or this machine, cannot do."""
    if args.param_hist:
        require_matplotlib("--param-hist")
    schedule = load_schedule(args.compress) if args.compress else CompressionSchedule()
    if schedule.quantizer is not None and processes.world_size > 1:
        raise InputError(
            "--compress: quantization-aware training is for one process, which tracks the ranges"
        )
    return schedule


def build_optimizer(args: Namespace, model: NeuMF) -> torch.optim.Adam:
    """The optimizer asked for, over all of the model's parameters."""
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    return LazyAdam(model.parameters(), model.tables(), lr=args.learning_rate)


def open_recorder(
    args: Namespace,
    device: torch.device,
    directory: Path | None,
    progress: Progress,
    batches: TrainingBatches,
) -> AbstractContextManager[Recorder | None]:
    """What records the run in its directory, in the first process; None in the others, which have none."""
    if directory is None:
        return nullcontext()
    if args.resume:
        drop_results_after(directory, progress.epoch, progress.step)
    elif not args.pretrain:  # which has cleared it, and resumes by its settings
        clear_run(directory)
    start_log(directory, device)
    done = progress.epoch * len(batches) + progress.step
    return Recorder(directory, pictures=args.param_hist, step=done if args.resume else 0)


def resolved_config(args: Namespace, split: Split, device: torch.device, model: NeuMF) -> dict[str, Any]:
    """Every setting as it was in the end: what ``config.json`` and checkpoints record."""
    sizes = sizes_from_state_dict(without_ranges(model.state_dict()))
    return settings(args) | {
        "factors": sizes["mf_dim"],
        "layers": sizes["mlp_layer_sizes"],
        "nb_users": split.nb_users,
        "nb_items": split.nb_items,
        "data_digest": split.digest,
        "device": str(device),
        "torch": str(torch.__version__),
        "command": command_line(),
    }


def settings(args: Namespace) -> dict[str, Any]:
    """The flags, as JSON can hold them."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del config["given"]
    return config
