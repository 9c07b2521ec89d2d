"""The data that a model is shown for calibration: test users' candidates, or training pairs."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from itertools import islice

import torch
from torch import nn

from distiller.calibration import TestFunction
from distiller.system.cli import InputError
from neural_cf.data.batches import TrainingBatches
from neural_cf.ranking.candidates import first_users, score_all
from neural_cf.runs.progress_bar import progress_bar
from neural_cf.runs.run import Run


def calibration_data(run: Run, share: float) -> TestFunction:
    """Return a function that shows a model a share of the data that ``--calibrate-on`` names.

    Args:
        run: The run.
        share: The share of the test users, the first ones, or of the training pairs; above 0, at most 1.

    Returns:
        It takes a model and calls it on batches of as many pairs as a user has candidates.

    Raises:
        InputError: there are fewer training pairs than one batch has.
    """
    settings, split = run.settings, run.split
    if settings.calibrate_on == "test":
        return partial(score_all, split=split, nb_users=first_users(split, share), device=run.device)
    size = split.nb_candidates
    batches = TrainingBatches(split, size, settings.negative_samples, settings.seed, run.device)
    if batches.nb_samples < size:
        raise InputError(
            f"--calibrate-on train: {batches.nb_samples} training pairs are fewer than one user's "
            f"{size} candidates, which a batch is to be of"
        )
    return partial(score_training_pairs, batches=batches, share=share)


@torch.inference_mode()
def score_training_pairs(model: nn.Module, batches: TrainingBatches, share: float) -> None:
    """Call a model on a share of an epoch's whole batches, at least one, for whoever watches it at that."""
    count = max(1, round(share * (batches.nb_samples // batches.batch_size)))
    bar = progress_bar(count, "Score training pairs", "batch")
    with closing(batches.epoch(0)) as samples, bar:
        for batch in islice(samples, count):
            model(batch.users, batch.items, sigmoid=True)
            bar.update()
