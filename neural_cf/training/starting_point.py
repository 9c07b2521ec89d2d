"""What a training starts from: new weights, joined branches, a checkpoint, or where a run to resume stands."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distiller.schedule import CompressionSchedule, load_schedule
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, has_both_branches, is_split, sizes_from_state_dict
from neural_cf.runs.directory import CHECKPOINT, holds_run
from neural_cf.runs.hardware import choose_precision
from neural_cf.runs.models import Checkpoint, load_float, restore_rounding
from neural_cf.runs.processes import Processes
from neural_cf.runs.recorder import require_matplotlib
from neural_cf.runs.run import Run
from neural_cf.runs.settings import Settings
from neural_cf.split import Split
from neural_cf.training.lazy_adam import LazyAdam
from neural_cf.training.pretraining import joined_model
from neural_cf.training.trainer import Progress

# The settings that decide what epochs are compared by, with what runs had before there was a choice.
OF_THE_METRICS = {"ranking": "sampled", "validate": False}
# Adam counts its steps in float32, which counts no further.
MOST_STEPS = 1 << 24
# The errors that a checkpoint raises which is a whole file and holds other values than it should.
WRONG_CONTENT = (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RuntimeError)


class StartingPoint(NamedTuple):
    """What a training starts from.

    Attributes:
        model: The model, on the run's device.
        optimizer: Over all of its parameters.
        schedule: What ``--compress`` does to both, bound to the optimizer.
        progress: How far the training has come that goes on.
        precision: Of the matrix products, one of ``hardware.PRECISIONS``.
        learning_rate: The rate that the run is recorded with.
        path: The checkpoint's file; None without a checkpoint.
        checkpoint: What was read from it; None likewise.
    """

    model: NeuMF
    optimizer: torch.optim.Adam
    schedule: CompressionSchedule
    progress: Progress
    precision: str
    learning_rate: float
    path: Path | None
    checkpoint: Checkpoint | None


def starting_point(run: Run) -> StartingPoint:
    """Return what a run's training starts from, with nothing written yet.

    Raises:
        InputError: the settings do not fit the checkpoint, the data, this machine or each other.
    """
    settings = run.settings
    path = check_start(settings, run.processes)
    schedule = schedule_of(settings, run.processes)
    precision = choose_precision(settings, run.device, schedule)
    model, checkpoint = initial_model(run, path, schedule)
    optimizer = build_optimizer(settings, model.to(run.device))
    progress, learning_rate = Progress(), settings.learning_rate
    goes_on = checkpoint is not None and not settings.reset_optimizer
    if goes_on:
        progress = restore(run, optimizer, checkpoint, path)
        if not settings.resume:
            learning_rate = optimizer.param_groups[0]["lr"]
    bind(settings, schedule, optimizer, checkpoint, learning_rate)
    if goes_on:
        restore_lagging(optimizer, checkpoint, path)
    if progress.epoch >= settings.epochs:
        raise InputError(
            f"-e/--epochs: {path} already has {progress.epoch} epochs, {settings.epochs} asked for"
        )
    return StartingPoint(model, optimizer, schedule, progress, precision, learning_rate, path, checkpoint)


def schedule_of(settings: Settings, processes: Processes) -> CompressionSchedule:
    """Return what ``--compress`` asks for.

    Raises:
        InputError: these processes, or this machine, cannot do what is asked for.
    """
    if settings.param_hist:
        require_matplotlib("--param-hist")
    schedule = load_schedule(settings.compress) if settings.compress else CompressionSchedule()
    if schedule.quantizer is not None and processes.world_size > 1:
        raise InputError(
            "--compress: quantization-aware training is for one process, which tracks the ranges"
        )
    return schedule


def build_optimizer(settings: Settings, model: NeuMF) -> torch.optim.Adam:
    """Return the optimizer asked for, over all of the model's parameters."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    return LazyAdam(model.parameters(), model.tables(), lr=settings.learning_rate)


def check_start(settings: Settings, processes: Processes) -> Path | None:
    """Return the checkpoint that training starts from, None for new weights.

    Raises:
        InputError: the run's directory holds a run that nobody said to overwrite or to resume.
    """
    directory = settings.out_dir
    if directory is None:
        return settings.load
    overwrites = holds_run(directory) and not (settings.resume or settings.overwrite)
    if processes.first and overwrites:
        raise InputError(
            f"-o/--out-dir: {directory} holds a run: --resume goes on with it, --overwrite starts again"
        )
    return directory / CHECKPOINT if settings.resume else settings.load


def initial_model(
    run: Run, start: Path | None, schedule: CompressionSchedule
) -> tuple[NeuMF, Checkpoint | None]:
    """Return the model that training starts with, and the checkpoint that it is from, if any.

    Raises:
        InputError: the checkpoint is not such as the settings ask for, or the schedule does not fit the model.
    """
    settings, split = run.settings, run.split
    torch.manual_seed(settings.seed)
    if start is None:
        check_schedule(schedule, meta_model(settings, split))
        return joined_model(run) if settings.pretrain else new_model(settings, split), None
    checkpoint = load_checkpoint(start)
    model = load_float(settings, start, checkpoint, split)
    check_schedule(schedule, copy.deepcopy(model))
    before = checkpoint.get("quantization_aware")
    if settings.resume and before is not None and before != schedule.quantizer:
        raise InputError(
            f"--compress: {start} was trained with another quantizer than {settings.compress} has now"
        )
    if before is not None and before == schedule.quantizer:
        restore_rounding(model, checkpoint, settings.split_final)
    return model, checkpoint


def new_model(settings: Settings, split: Split) -> NeuMF:
    """Return a model of the sizes asked for, with new weights from PyTorch's generator."""
    return NeuMF(
        split.nb_users, split.nb_items, settings.factors, list(settings.layers), settings.split_final
    )


def meta_model(settings: Settings, split: Split) -> NeuMF:
    """Return a model of the sizes asked for, without weights."""
    with torch.device("meta"):
        return new_model(settings, split)


def check_schedule(schedule: CompressionSchedule, model: NeuMF) -> None:
    """Raise an ``InputError`` unless the schedule fits the model, which is changed."""
    sizes = sizes_from_state_dict(model.state_dict())
    whole = has_both_branches(sizes["mf_dim"], sizes["mlp_layer_sizes"])
    if schedule.quantizer is not None and not whole:
        raise InputError("--compress: quantization-aware training is for a model of both branches")
    schedule.check(model)


def restore(run: Run, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, path: Path) -> Progress:
    """Put the optimizer where a checkpoint left it, and return where training goes on from.

    Args:
        run: The run that goes on.
        optimizer: Over the checkpoint's model; changed in place. A learning rate that the user gave is the new one.
        checkpoint: Where to go on from.
        path: Its file, for messages.

    Raises:
        InputError: the checkpoint has no such state, or the settings do not go on from it.
    """
    settings = run.settings
    if is_split(checkpoint["state_dict"]) != settings.split_final:
        raise InputError(
            f"--split-final: {path} has its final layer the other way, which its optimizer state cannot follow; "
            "--reset-optimizer starts without that state"
        )
    try:
        # The original's checkpoints are of whole epochs.
        progress = Progress(
            **(checkpoint["progress"] if "progress" in checkpoint else {"epoch": checkpoint["epoch"] + 1})
        )
        load_optimizer(optimizer, checkpoint["optimizer_state_dict"])
        if (progress.epoch or progress.step) and not checkpoint["optimizer_state_dict"]["state"]:
            raise ValueError("no moments")
        before = settings_before(checkpoint["config"] if "progress" in checkpoint else {})
        if settings.resume:  # ``bind`` reads these two
            float(checkpoint["config"]["learning_rate"])
            checkpoint["schedule_state_dict"] = dict(checkpoint["schedule_state_dict"])
    except WRONG_CONTENT as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no state to go on from ({type(error).__name__}: {reason}); --reset-optimizer starts without one"
        ) from error
    check_going_on(run, progress, before, checkpoint, path)
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # of a schedule that has ended with its run
        if "learning_rate" in settings.given:
            group["lr"] = settings.learning_rate
    # A new run has no best.pth.tar yet.
    return progress if settings.resume else replace(progress, best_hr=Progress.best_hr, best_epoch=None)


def settings_before(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint's training that matter to a run that goes on with it.

    Raises:
        TypeError: one of them is no setting.
    """
    before = {name: config.get(name) for name in ("batch_size", "negative_samples", "seed")}
    before |= {name: config.get(name, default) for name, default in OF_THE_METRICS.items()}
    before["cutoffs"] = list(config.get("cutoffs", [config.get("topk")]))
    for name, value in [*before.items(), *(("cutoffs", k) for k in before["cutoffs"])]:
        if not isinstance(value, str | int | list | None):
            raise TypeError(f"{name} is {type(value).__name__}")
    return before


def load_optimizer(optimizer: torch.optim.Adam, state: dict[str, Any]) -> None:
    """Take over an Adam's state from a checkpoint; raise one of ``WRONG_CONTENT`` unless it is one."""
    groups = optimizer.param_groups
    own = {name: groups[0][name] for name in ("fused", "foreach", "capturable")}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(own)
        _check_group(group)
    # Before the first step there are none.
    for parameter in optimizer.param_groups[0]["params"] if state["state"] else ():
        moments = optimizer.state[parameter]
        if {moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {parameter.shape}:
            raise ValueError("moments of other shapes than the weights")
        if not 0 <= moments["step"].item() <= MOST_STEPS:
            raise ValueError(f"{moments['step'].item()} steps")


def _check_group(group: dict[str, Any]) -> None:
    """Raise a ``ValueError`` unless a parameter group's settings are such as Adam can have here."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name} is {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']}")
    for name in ("amsgrad", "maximize", "differentiable"):
        if group[name] is not False:
            raise ValueError(f"Adam with {name}")


def bind(
    settings: Settings,
    schedule: CompressionSchedule,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint | None,
    learning_rate: float,
) -> None:
    """Put the learning-rate schedulers in charge of the optimizer, for a run to resume where they stood."""
    schedule.bind(optimizer)
    if settings.resume:
        schedule.load_state_dict(checkpoint["schedule_state_dict"])
        if learning_rate == checkpoint["config"]["learning_rate"]:
            # Binding has set the rate to the schedule's start; this is the one that it had reached.
            load_optimizer(optimizer, checkpoint["optimizer_state_dict"])


def restore_lagging(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, path: Path) -> None:
    """Take a lazy optimizer back to the lagging rows of a checkpoint, if it goes on at the rate that they lag at.

    Raises:
        InputError: they are not such rows.
    """
    lagging = checkpoint.get("lagging_rows")
    if not isinstance(optimizer, LazyAdam) or lagging is None:
        return
    if optimizer.param_groups[0]["lr"] == checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"]:
        try:
            optimizer.restore_lagging(lagging)
        except WRONG_CONTENT as error:
            raise InputError(f"{path}: lagging_rows: {error}") from error


def check_going_on(
    run: Run, progress: Progress, before: dict[str, Any], checkpoint: Checkpoint, path: Path
) -> None:
    """Raise an ``InputError`` unless a run can go on from a checkpoint with its batches, data and metrics."""
    settings = run.settings
    for flag, name in (
        ("-b/--batch-size", "batch_size"),
        ("-n/--negative-samples", "negative_samples"),
        ("-s/--seed", "seed"),
        ("--validate", "validate"),
    ):
        if progress.step and before[name] != getattr(settings, name):
            raise InputError(
                f"{flag}: {path} stands within an epoch that began with {before[name]}, which cannot go on with "
                f"{getattr(settings, name)}; --reset-optimizer starts from epoch 0"
            )
    if settings.resume:
        check_same_metrics(before, settings)
    if settings.resume and checkpoint.get("data_digest") != run.split.digest:
        raise InputError(
            f"--resume: {path} was trained on other data than {settings.data}, or on a copy as CSV files"
        )


def check_same_metrics(before: dict[str, Any], settings: Settings) -> None:
    """Raise an ``InputError`` where a resumed run's epochs would not compare with those before."""
    if before["cutoffs"] != list(settings.cutoffs):
        ours, theirs = (" ".join(map(str, cutoffs)) for cutoffs in (settings.cutoffs, before["cutoffs"]))
        raise InputError(f"-k/--topk: the run has {theirs}, not {ours}")
    for name in OF_THE_METRICS:
        if before[name] != getattr(settings, name):
            raise InputError(f"--{name}: the run has {before[name]}, not {getattr(settings, name)}")
