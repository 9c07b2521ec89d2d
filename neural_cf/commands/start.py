"""How a run begins and ends: device, processes, data and directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from neural_cf.commands.conflicts import check_with_data
from neural_cf.runs.directory import run_directory
from neural_cf.runs.hardware import choose_device
from neural_cf.runs.log import show_messages
from neural_cf.runs.processes import join_processes, leave_processes
from neural_cf.runs.run import Run
from neural_cf.runs.settings import Settings
from neural_cf.split import load_split


@contextmanager
def started(settings: Settings, prog: str) -> Iterator[Run]:
    """Open the run that settings ask for; when it is done, end this process where it is one of several.

    Args:
        settings: What was asked for.
        prog: The command's name, for warnings.

    Raises:
        InputError: the data cannot be read, is not such as the settings need, or the directory is in use.
    """
    device = choose_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    processes = join_processes(device.type)
    if processes.first:
        show_messages(prog)
    else:
        logging.disable()  # the first process says it
    settings = replace(settings, seed=processes.agree(settings.seed))
    if settings.threads:
        torch.set_num_threads(min(settings.threads, os.cpu_count()))
    split = load_split(settings.data)
    check_with_data(settings, split, processes)
    own = run_directory(settings.out_dir, settings.name) if processes.first else nullcontext()
    with own as directory:
        yield Run(settings, split, device, processes, processes.agree(directory))
    leave_processes(processes)
