"""The data that a model is shown for calibration: test users' candidates or training pairs."""

from __future__ import annotations

from argparse import Namespace
from contextlib import closing
from functools import partial

import torch
from torch import nn
from tqdm import trange

from distiller.calibration import TestFunction
from distiller.system.cli import InputError
from neural_cf.data.batches import TrainingBatches
from neural_cf.ranking.candidates import first_users, score_all
from neural_cf.split import Split


@torch.inference_mode()
def score_training_pairs(model: nn.Module, batches: TrainingBatches, share: float) -> None:
    """Score a share of an epoch's whole batches, at least one, for whoever watches the model at it."""
    whole = batches.nb_samples // batches.batch_size
    with closing(batches.epoch(0)) as samples:
        for _ in trange(max(1, round(share * whole)), desc="Score training pairs", unit="batch"):
            batch = next(samples)
            model(batch.users, batch.items, sigmoid=True)


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
