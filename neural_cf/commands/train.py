"""``neural-cf train`` and ``ncf.py`` without another mode: a training run from its start to its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from distiller.quantization.train_aware import without_ranges
from distiller.system.cli import InputError
from neural_cf.commands.arguments import parse_settings
from neural_cf.commands.evaluate import evaluate_best
from neural_cf.commands.flags import (
    add_final_layer,
    add_load,
    add_metrics,
    add_run_flags,
    add_sizes,
    add_training_flags,
    new_parser,
)
from neural_cf.commands.start import started
from neural_cf.data.batches import TrainingBatches
from neural_cf.data.validation_split import validation_split
from neural_cf.model import sizes_from_state_dict
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
from neural_cf.runs.models import training_of
from neural_cf.runs.recorder import Recorder
from neural_cf.runs.run import Run
from neural_cf.training.pretraining import BRANCHES, Trained, branch_run, train_branches
from neural_cf.training.starting_point import (
    StartingPoint,
    check_schedule,
    check_start,
    meta_model,
    schedule_of,
    starting_point,
)
from neural_cf.training.step import Step
from neural_cf.training.trainer import Progress, Trainer

PROG = "neural-cf train"

log = logging.getLogger("ncf")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    parser = new_parser(PROG, "Train NeuMF on a split and keep the best epoch's model.")
    model = parser.add_argument_group("Model").add_argument
    add_sizes(model)
    add_final_layer(model)
    add_load(model, "checkpoint to go on training from")
    add_training_flags(parser.add_argument_group("Training").add_argument)
    add_metrics(parser.add_argument_group("Evaluation after each epoch").add_argument)
    add_run_flags(parser.add_argument_group("Run").add_argument)
    settings = parse_settings(argv, parser)
    with started(settings, PROG) as run:
        train_and_test(run)


def train_and_test(run: Run) -> None:
    """Train as the settings ask, the branches before the whole model; then test what ``--validate`` chose."""
    if run.settings.pretrain:
        run = pretrain(run)
        if run.settings.max_steps == 0:
            return
    if is_to_be_tested(run):
        if run.processes.first:
            start_log(run.directory, run.device)
    elif not train(run).finished:
        return
    if run.settings.validate:
        evaluate_best(run)


def is_to_be_tested(run: Run) -> bool:
    """Return whether the run to resume was stopped after its last epoch and before ``--validate`` tested the best."""
    settings = run.settings
    if not (settings.resume and settings.validate):
        return False
    return epochs_done(run.directory) >= settings.epochs and not (run.directory / RANKS).exists()


def pretrain(run: Run) -> Run:
    """Train both branches alone, or what is left of them in a run to resume.

    Returns:
        The run that trains the whole model. It has no steps left where ``max_steps`` ended before it.
    """
    run = replace(run, settings=replace(run.settings, out_dir=run.directory))
    if not run.settings.resume:
        begin_pretraining(run)
    elif (run.directory / CHECKPOINT).exists():
        return run  # the branches have been joined
    left = train_branches(run, train)
    run.processes.agree(None)  # the first one has written what all read
    # The directory holds nothing but the settings.
    return replace(run, settings=replace(run.settings, max_steps=left, resume=False, overwrite=True))


def begin_pretraining(run: Run) -> None:
    """Write a run's settings, for ``--resume`` before there is a checkpoint of the whole model."""
    parts = [run, *(branch_run(run, branch) for branch in BRANCHES)]
    for part in parts:
        check_start(part.settings, run.processes)
    # What the whole model's training would refuse only after its branches are trained.
    schedule = schedule_of(run.settings, run.processes)
    check_schedule(schedule, meta_model(run.settings, run.split))
    choose_precision(run.settings, run.device, schedule)
    if run.settings.validate:
        validation_split(run.split, run.settings.data)
    run.processes.agree(None)  # no file changes before all have looked
    if run.processes.first:
        for part in parts:
            clear_run(part.directory)
        write_config(run.directory, run.settings.to_config())


def train(run: Run) -> Trained:
    """Train, from new weights, from joined branches, from ``--load``, or from where the run to resume stands."""
    settings = run.settings
    start = starting_point(run)
    seen = run.split
    if settings.validate:
        seen = validation_split(run.split, settings.data)
        warn_of_validation_items(start)
    batches = TrainingBatches(
        seen, settings.batch_size, settings.negative_samples, settings.seed, run.device, run.processes
    )
    if not 0 <= start.progress.step <= len(batches):
        raise InputError(f"{start.path}: step {start.progress.step} of an epoch of {len(batches)}")
    run.processes.agree(None)  # no file changes before all have read
    with open_recorder(run, start.progress, batches) as recorder:
        compiled = choose_compilation(settings, run.device)
        log.info(
            "Training with %s, %s matrix products, %s, on %s",
            *(settings.optimizer, start.precision, "compiled" if compiled else "not compiled", run.device),
        )
        config = resolved_config(run, start) | {"compiled": compiled}
        if recorder is not None:
            write_config(run.directory, config)
        step = Step(start.model, start.optimizer, start.precision, compiled, run.processes, settings.l2)
        trainer = Trainer(
            replace(run, split=seen), step, batches, recorder, config, start.schedule, start.progress
        )
        if settings.pretrain and start.path is None:
            log.info("Joined: %s", describe(trainer.keep_start()))
        steps = trainer.train()
        log.info("%s", trainer.describe_best())
        return Trained(steps, trainer.finished)


def warn_of_validation_items(start: StartingPoint) -> None:
    """Warn where training goes on from a model that has seen what it is to be validated by."""
    if start.checkpoint and not training_of(start.checkpoint)["validate"]:
        log.warning(
            "--validate: %s was trained on the items that it is validated by from here on", start.path
        )


def open_recorder(
    run: Run, progress: Progress, batches: TrainingBatches
) -> AbstractContextManager[Recorder | None]:
    """Return what records the run in its directory: in the first process, and None in the others."""
    if not run.processes.first:
        return nullcontext()
    settings = run.settings
    if settings.resume:
        drop_results_after(run.directory, progress.epoch, progress.step)
    elif not settings.pretrain:  # which has cleared it, and resumes by its settings
        clear_run(run.directory)
    start_log(run.directory, run.device)
    done = progress.epoch * len(batches) + progress.step
    return Recorder(run.directory, pictures=settings.param_hist, step=done if settings.resume else 0)


def resolved_config(run: Run, start: StartingPoint) -> dict[str, Any]:
    """Return every setting as it was in the end, and what it was run on: for ``config.json`` and checkpoints."""
    sizes = sizes_from_state_dict(without_ranges(start.model.state_dict()))
    return run.settings.to_config() | {
        "factors": sizes["mf_dim"],
        "layers": sizes["mlp_layer_sizes"],
        "precision": start.precision,
        "learning_rate": start.learning_rate,
        "nb_users": run.split.nb_users,
        "nb_items": run.split.nb_items,
        "data_digest": run.split.digest,
        "device": str(run.device),
        "torch": str(torch.__version__),
        "command": command_line(),
    }
