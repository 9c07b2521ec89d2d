"""What a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from neural_cf.runs.processes import Processes
from neural_cf.runs.settings import Settings
from neural_cf.split import Split


@dataclass(frozen=True)
class Run:
    """A run: what was asked for, and what it is done with.

    Attributes:
        settings: What the user asked for.
        split: The data.
        device: Where models are and where they are computed.
        processes: The processes that share the work, this one among them. Only the first one writes files.
        directory: Where the run leaves its files; the same in all processes.
    """

    settings: Settings
    split: Split
    device: torch.device
    processes: Processes
    directory: Path
