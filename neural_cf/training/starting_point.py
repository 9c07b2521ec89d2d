"""What a training starts from: new weights, joined branches, a checkpoint, or where a run stands."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from distiller.schedule import CompressionSchedule
from distiller.system.cli import InputError
from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, has_both_branches, is_split, sizes_from_state_dict
from neural_cf.runs.directory import CHECKPOINT, holds_run
from neural_cf.runs.models import load_model, restore_rounding
from neural_cf.runs.processes import Processes
from neural_cf.split import Split
from neural_cf.training.lazy_adam import LazyAdam
from neural_cf.training.pretraining import joined_model
from neural_cf.training.trainer import Progress

# What runs have that were begun before there was a choice.
OF_THE_METRICS = {"ranking": "sampled", "validate": False}
# Adam counts its steps in float32, which counts no further.
MOST_STEPS = 1 << 24
# What becomes of a checkpoint that is whole and holds other values than it should.
WRONG_CONTENT = (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RuntimeError)


def check_start(args: Namespace, processes: Processes) -> str | Path | None:
    """The checkpoint that training starts from; an ``InputError`` where it would overwrite a run unasked."""
    if args.out_dir is None:
        return args.load
    overwrites = holds_run(Path(args.out_dir)) and not (args.resume or args.overwrite)
    if processes.first and overwrites:
        raise InputError(
            f"-o/--out-dir: {args.out_dir} holds a run: --resume goes on with it, --overwrite starts again"
        )
    return Path(args.out_dir) / CHECKPOINT if args.resume else args.load


def initial_model(
    args: Namespace, start: str | Path | None, split: Split, schedule: CompressionSchedule
) -> tuple[NeuMF, dict[str, Any] | None]:
    """The model that training starts with, and the checkpoint that it is from, if any."""
    torch.manual_seed(args.seed)
    if start is None:
        check_schedule(schedule, meta_model(args, split))
        if args.pretrain:
            return joined_model(args, split), None
        return NeuMF(split.nb_users, split.nb_items, args.factors, args.layers, args.split_final), None
    checkpoint = load_checkpoint(start)
    model = load_model(args, start, checkpoint, split)
    check_schedule(schedule, copy.deepcopy(model))
    before = checkpoint.get("quantization_aware")
    if args.resume and before is not None and before != schedule.quantizer:
        raise InputError(
            f"--compress: {start} was trained with another quantizer than {args.compress} has now"
        )
    if before is not None and before == schedule.quantizer:
        restore_rounding(model, checkpoint, args)
    return model, checkpoint


def check_schedule(schedule: CompressionSchedule, model: NeuMF) -> None:
    """Raise an ``InputError`` unless the schedule fits the model, which is changed."""
    sizes = sizes_from_state_dict(model.state_dict())
    if schedule.quantizer is not None and not has_both_branches(sizes["mf_dim"], sizes["mlp_layer_sizes"]):
        raise InputError("--compress: quantization-aware training is for a model of both branches")
    schedule.check(model)


def meta_model(args: Namespace, split: Split) -> NeuMF:
    """A model of the sizes asked for, without weights."""
    with torch.device("meta"):
        return NeuMF(split.nb_users, split.nb_items, args.factors, args.layers, args.split_final)


def restore(
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any],
    split: Split,
    args: Namespace,
    path: str | Path,
) -> Progress:
    """Put the optimizer where the checkpoint left it; where training goes on from."""
    if is_split(checkpoint["state_dict"]) != args.split_final:
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
        if args.resume:  # from which ``bind`` goes on
            float(checkpoint["config"]["learning_rate"])
            checkpoint["schedule_state_dict"] = dict(checkpoint["schedule_state_dict"])
    except WRONG_CONTENT as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no state to go on from ({type(error).__name__}: {reason}); --reset-optimizer starts without one"
        ) from error
    check_going_on(progress, before, checkpoint, split, args, path)
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # of a schedule that has ended with its run
        if "learning_rate" in args.given:
            group["lr"] = args.learning_rate
    if not args.resume:
        args.learning_rate = optimizer.param_groups[0]["lr"]  # what the configuration then records
        progress.best_hr = Progress.best_hr  # the new run has no best.pth.tar yet
    return progress


def settings_before(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's run was trained with, where they matter to who goes on with it.

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
    """Take over an Adam's state from a checkpoint; an error of ``WRONG_CONTENT`` unless it is one."""
    groups = optimizer.param_groups
    own = {name: groups[0][name] for name in ("fused", "foreach", "capturable")}
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(own)
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} is {group[name]}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas are {group['betas']}")
        for name in ("amsgrad", "maximize", "differentiable"):
            if group[name] is not False:
                raise ValueError(f"Adam with {name}")
    # Before the first step there are none.
    for parameter in optimizer.param_groups[0]["params"] if state["state"] else ():
        moments = optimizer.state[parameter]
        if {moments["exp_avg"].shape, moments["exp_avg_sq"].shape} != {parameter.shape}:
            raise ValueError("moments of other shapes than the weights")
        if not 0 <= moments["step"].item() <= MOST_STEPS:
            raise ValueError(f"{moments['step'].item()} steps")


def bind(
    schedule: CompressionSchedule,
    optimizer: torch.optim.Optimizer,
    checkpoint: dict[str, Any] | None,
    args: Namespace,
) -> None:
    """Put the learning-rate schedulers in charge of the optimizer, on ``--resume`` where they stood."""
    schedule.bind(optimizer)
    if args.resume:
        schedule.load_state_dict(checkpoint["schedule_state_dict"])
        if args.learning_rate == checkpoint["config"]["learning_rate"]:
            # Binding has set the rate to the schedule's start; this is the one that it had reached.
            load_optimizer(optimizer, checkpoint["optimizer_state_dict"])


def restore_lagging(optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Take a lazy optimizer back to the rows that it had, where it goes on at the rate that they were moved with."""
    lagging = checkpoint.get("lagging_rows")
    if not isinstance(optimizer, LazyAdam) or lagging is None:
        return
    if optimizer.param_groups[0]["lr"] == checkpoint["optimizer_state_dict"]["param_groups"][0]["lr"]:
        try:
            optimizer.restore_lagging(lagging)
        except WRONG_CONTENT as error:
            raise InputError(f"{path}: lagging_rows: {error}") from error


def check_going_on(
    progress: Progress,
    before: dict[str, Any],
    checkpoint: dict[str, Any],
    split: Split,
    args: Namespace,
    path: str | Path,
) -> None:
    """Raise an ``InputError`` unless the run can be gone on with: with these batches, data and metrics."""
    for flag, name in (
        ("-b/--batch-size", "batch_size"),
        ("-n/--negative-samples", "negative_samples"),
        ("-s/--seed", "seed"),
        ("--validate", "validate"),
    ):
        if progress.step and before[name] != getattr(args, name):
            raise InputError(
                f"{flag}: {path} stands within an epoch that began with {before[name]}, which cannot go on with "
                f"{getattr(args, name)}; --reset-optimizer starts from epoch 0"
            )
    if args.resume:
        check_same_metrics(before, args)
    if args.resume and checkpoint.get("data_digest") != split.digest:
        raise InputError(
            f"--resume: {path} was trained on other data than {args.data}, or on a copy as CSV files"
        )


def check_same_metrics(before: dict[str, Any], args: Namespace) -> None:
    """Raise an ``InputError`` where a resumed run's epochs would not compare with those before."""
    if before["cutoffs"] != args.cutoffs:
        ours, theirs = (" ".join(map(str, cutoffs)) for cutoffs in (args.cutoffs, before["cutoffs"]))
        raise InputError(f"-k/--topk: the run has {theirs}, not {ours}")
    for name in OF_THE_METRICS:
        if before[name] != getattr(args, name):
            raise InputError(f"--{name}: the run has {before[name]}, not {getattr(args, name)}")
