"""Pre-training: the two branches are trained alone, then joined and trained on (He et al. 2017, section 3.4.1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, StateDict, with_final_layer
from neural_cf.runs.directory import CHECKPOINT, epochs_done, run_directory
from neural_cf.runs.models import load_float
from neural_cf.runs.run import Run
from neural_cf.runs.settings import Settings

ALPHA = 0.5  # GMF's weight in the joined model; 1 - ALPHA is the MLP's. The paper's section 4.1 has it so.
# Each branch's own directory in the run's, and the settings that leave the other branch out.
BRANCHES: dict[str, dict[str, Any]] = {"gmf": {"layers": (0,)}, "mlp": {"factors": 0}}
# Settings of the whole model that its branches do without.
OF_THE_WHOLE = {
    "pretrain": None,
    "split_final": False,
    "threshold": None,
    "patience": None,
    "compress": None,
    "report": None,
}

log = logging.getLogger("ncf")


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
        steps: The steps that it took.
        finished: Whether it came to its end, and not only to the end of ``max_steps``.
    """

    steps: int
    finished: bool


def train_branches(run: Run, train: Callable[[Run], Trained]) -> int | None:
    """Train each branch alone, or finish its training, in its directory within the run's.

    Args:
        run: The whole run.
        train: Trains a model as a run's settings ask.

    Returns:
        What is left of ``max_steps``, None without such a limit. Both branches are trained to their end unless it is 0.
    """
    left = run.settings.max_steps
    with ExitStack() as held:  # the second branch's directory too while the first one is trained
        if run.processes.first:
            for branch in BRANCHES:
                held.enter_context(run_directory(run.directory / branch))
        for branch in BRANCHES:
            own = branch_run(run, branch, left)
            if not (own.settings.resume and epochs_done(own.directory) >= own.settings.epochs):
                log.info("Training %s alone", branch.upper())
                steps = train(own).steps
                if left is not None:
                    left -= steps
            if left == 0:
                break
    return left


def branch_run(run: Run, branch: str, max_steps: int | None = None) -> Run:
    """Return the run that trains a branch, of at most ``max_steps``."""
    settings = replace(branch_settings(run.settings, branch), max_steps=max_steps)
    directory = run.directory / branch
    resume = run.settings.resume and (directory / CHECKPOINT).exists()
    return replace(run, settings=replace(settings, out_dir=directory, resume=resume), directory=directory)


def branch_settings(settings: Settings, branch: str) -> Settings:
    """Return the settings of a branch's training, by those of the whole run."""
    return replace(
        settings,
        **BRANCHES[branch],
        **OF_THE_WHOLE,
        epochs=dict(zip(BRANCHES, settings.pretrain, strict=True))[branch],
        learning_rate=settings.pretrain_rate,
        # A branch that was stopped before its first checkpoint begins again.
        overwrite=settings.resume or settings.overwrite,
        given=settings.given | {"learning_rate"},
    )


def joined_model(run: Run) -> NeuMF:
    """Return the NeuMF of both trained branches, its final layer as the settings have it.

    Raises:
        InputError: a branch is missing, or of other data or sizes.
    """
    settings, split = run.settings, run.split
    branches = []
    for branch in BRANCHES:
        path = run.directory / branch / CHECKPOINT
        own = branch_settings(settings, branch)
        branches.append(load_float(own, path, load_checkpoint(path), split).state_dict())
    model = NeuMF(
        split.nb_users, split.nb_items, settings.factors, list(settings.layers), settings.split_final
    )
    model.load_state_dict(with_final_layer(joined_weights(*branches), settings.split_final))
    return model


def joined_weights(gmf: StateDict, mlp: StateDict) -> dict[str, Tensor]:
    """Return the weights of the NeuMF whose logit is ``ALPHA`` times GMF's and 1 - ``ALPHA`` times the MLP's.

    That is equation 13 of the paper.
    """
    weights = {key: tensor for key, tensor in gmf.items() if key.startswith("mf_")}
    weights |= {key: tensor for key, tensor in mlp.items() if key.startswith(("mlp.", "mlp_"))}
    final = [ALPHA * gmf["final.weight"], (1 - ALPHA) * mlp["final.weight"]]
    weights["final.weight"] = torch.cat(final, dim=1)
    weights["final.bias"] = ALPHA * gmf["final.bias"] + (1 - ALPHA) * mlp["final.bias"]
    return weights
