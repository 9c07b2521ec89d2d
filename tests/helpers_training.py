"""What tests of training runs share: their flags, and what the runs leave."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from distiller.untrusted.checkpoint import load_checkpoint
from neural_cf.runs.processes import Processes
from neural_cf.runs.run import Run
from neural_cf.runs.settings import Settings
from neural_cf.split import Split

TRAIN = ["--layers", "8", "6", "4", "-f", "4", "-s", "1", "-l", "0.01"]


STEPS = 38  # an epoch at the default batch size: 1940 pairs and 4 negatives each, in batches of 256


def weights(directory: str, name: str = "checkpoint.pth.tar") -> dict[str, torch.Tensor]:
    """A run's weights."""
    return load_checkpoint(Path(directory) / name)["state_dict"]


def same(first: dict, second: dict) -> bool:
    """Bit for bit, in dictionaries of dictionaries too."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if torch.is_tensor(first):
        return first.dtype == second.dtype and torch.equal(first, second)
    return first == second


def rows(directory: str) -> list[dict[str, str]]:
    """A run's results."""
    with open(Path(directory) / "valid_results.csv", newline="") as file:
        return list(csv.DictReader(file))


def run_of(split: Split, directory: Path | str = ".", **settings: object) -> Run:
    """A run of one process on the processor."""
    own = Settings(data=Path("split"), **settings)
    return Run(own, split, torch.device("cpu"), Processes(), Path(directory))
