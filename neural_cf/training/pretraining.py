"""Pre-training: the two branches are trained alone, then joined and trained on (He et al. 2017, section 3.4.1)."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.model import NeuMF, StateDict, with_final_layer
from neural_cf.runs.directory import CHECKPOINT, epochs_done, run_directory
from neural_cf.runs.models import load_model
from neural_cf.split import Split

ALPHA = 0.5  # GMF's weight in the joined model; 1 - ALPHA is the MLP's. The paper's section 4.1 has it so.
# Each branch's own directory in the run's, and what leaves the other branch out.
BRANCHES = {"gmf": {"layers": [0]}, "mlp": {"factors": 0}}
log = logging.getLogger("ncf")


def train_branches(args: Namespace, train: Callable[..., Any], first: bool) -> bool:
    """Train each branch alone, or finish its training, in its directory within ``args.out_dir``.

    Args:
        args: Of the whole run. Its ``max_steps``, where there is such a limit, are what is left of them afterwards.
        train: Trains as flags say, in the ``directory`` given, None in a process that is not the first; a
            ``running.Trained``.
        first: Whether this is the first process.

    Returns:
        Whether both are trained to their end.
    """
    runs = {branch: branch_args(args, branch) for branch in BRANCHES}
    with ExitStack() as held:  # the one's directory too while the other is trained
        directories = {
            branch: held.enter_context(run_directory(own.out_dir, None)) if first else None
            for branch, own in runs.items()
        }
        for branch, own in runs.items():
            if not (own.resume and epochs_done(Path(own.out_dir)) >= own.epochs):
                log.info("Training %s alone", branch.upper())
                own.max_steps = args.max_steps
                trained = train(own, directory=directories[branch])
                if args.max_steps is not None:
                    args.max_steps -= trained.steps
            if args.max_steps == 0:
                return False
    return True


def branch_args(args: Namespace, branch: str) -> Namespace:
    """The flags of a branch's training, by those of the whole run."""
    directory = Path(args.out_dir) / branch
    own = {
        "out_dir": str(directory),
        "epochs": dict(zip(BRANCHES, args.pretrain, strict=True))[branch],
        "learning_rate": args.pretrain_rate,
        "resume": args.resume and (directory / CHECKPOINT).exists(),
        # A branch that was stopped before its first checkpoint begins again.
        "overwrite": args.resume or args.overwrite,
        "given": args.given | {"learning_rate"},
    }
    whole_only = {"pretrain": None, "split_final": False, "threshold": None, "compress": None, "report": None}
    return Namespace(**vars(args) | BRANCHES[branch] | whole_only | own)


def joined_model(args: Namespace, split: Split) -> NeuMF:
    """The NeuMF of both trained branches, its final layer as the flags have it.

    Raises:
        InputError: one of them is missing, or of other data or sizes.
    """
    branches = []
    for branch in BRANCHES:
        own = branch_args(args, branch)
        path = Path(own.out_dir) / CHECKPOINT
        branches.append(load_model(own, path, load_checkpoint(path), split).state_dict())
    model = NeuMF(split.nb_users, split.nb_items, args.factors, args.layers, args.split_final)
    model.load_state_dict(with_final_layer(joined_weights(*branches), args.split_final))
    return model


def joined_weights(gmf: StateDict, mlp: StateDict) -> dict[str, Tensor]:
    """Weights of the NeuMF whose logit is ``ALPHA`` times GMF's and 1 - ``ALPHA`` times the MLP's (equation 13)."""
    weights = {key: tensor for key, tensor in gmf.items() if key.startswith("mf_")}
    weights |= {key: tensor for key, tensor in mlp.items() if key.startswith(("mlp.", "mlp_"))}
    final = [ALPHA * gmf["final.weight"], (1 - ALPHA) * mlp["final.weight"]]
    weights["final.weight"] = torch.cat(final, dim=1)
    weights["final.bias"] = ALPHA * gmf["final.bias"] + (1 - ALPHA) * mlp["final.bias"]
    return weights
