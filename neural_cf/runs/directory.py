"""The directory of a run: its files' names, its lock, and what is cleared when a run starts or resumes."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distiller.quantization.post_train import PARAMS_FILE, PREPARED_STATS_FILE, PostTrainLinearQuantizer
from distiller.quantization.saved import content_of
from distiller.system.cli import InputError
from distiller.system.files import atomic_write, file_digest, remove_parts
from distiller.system.locks import LockHeldError, locked
from distiller.untrusted.checkpoint import load_checkpoint, save_checkpoint
from neural_cf.runs.log import command_line
from neural_cf.split import Split

CHECKPOINT, BEST, QUANTIZED = "checkpoint.pth.tar", "best.pth.tar", "quantized.pth.tar"
AUTO = "quant_auto.yaml"
CONFIG, RESULTS, RANKS = "config.json", "valid_results.csv", "ranks.npy"
LOCK = ".lock"
REPORT, RANGES, ERRORS = "quant_report.csv", "quant_ranges.png", "quant_errors.png"
PICTURES = "histograms"
RUNS = Path("run/neumf")


@contextmanager
def run_directory(out_dir: Path | None, name: str | None = None) -> Iterator[Path]:
    """Make a run's directory if it is missing, and lock it against other processes until the run is done.

    Directories that were made and have stayed empty are removed then.

    Args:
        out_dir: The directory; None for a fresh one below ``RUNS``, named by date and time.
        name: Text that stands before the date in the name of a fresh directory.

    Raises:
        InputError: another run is using it.
        OSError: it cannot be made or written.
    """
    wanted = RUNS if out_dir is None else out_dir
    made = [path for path in (wanted, *wanted.parents) if not path.exists()]
    wanted.mkdir(parents=True, exist_ok=True)
    if out_dir is None:
        wanted = _fresh_directory(RUNS, f"{name}-" if name else "")
        made.insert(0, wanted)
    try:
        with locked(wanted / LOCK, command_line()):
            for directory in (wanted, wanted / PICTURES):
                remove_parts(directory)
            yield wanted
    except LockHeldError as error:
        raise InputError(f"-o/--out-dir: {wanted} is in use by {error}") from None
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _fresh_directory(parent: Path, prefix: str) -> Path:
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    for number in range(1, 1000):
        directory = parent / f"{prefix}{stamp}{f'-{number}' if number > 1 else ''}"
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise InputError(f"-o/--out-dir: no free name like {directory} in {parent}")


def write_ranks(directory: Path, ranks: Tensor) -> None:
    """Write the ranks of the users' test items, (U,) int64, 0 for the first place."""
    with atomic_write(directory / RANKS) as temporary, temporary.open("wb") as file:
        np.save(file, ranks.numpy(), allow_pickle=False)


def write_quantized(
    directory: Path,
    quantizer: PostTrainLinearQuantizer,
    float_checkpoint: str | Path,
    training: Mapping[str, Any],
    split: Split,
) -> None:
    """Write a quantized model as a checkpoint for ``--load``.

    Args:
        directory: The run's directory.
        quantizer: It has prepared the model.
        float_checkpoint: The file of the float model, whose digest is kept.
        training: What reports say of the float model's training: ``seed`` and ``validate``.
        split: The split, whose digest is kept.
    """
    origin = {
        "arch": "NeuMF",
        "float_digest": file_digest(float_checkpoint),
        "config": dict(training),
        "data_digest": split.digest,
        "command": command_line(),
    }
    save_checkpoint(directory / QUANTIZED, origin | content_of(quantizer))


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved settings of a run as JSON."""
    with atomic_write(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def holds_run(directory: Path) -> bool:
    """Return whether training has left something in a directory."""
    return any((directory / name).exists() for name in (CHECKPOINT, BEST, CONFIG, RESULTS))


def epochs_done(directory: Path) -> int:
    """Return the number of epochs that a run's last checkpoint has behind it.

    Raises:
        InputError: the checkpoint does not say.
    """
    path = directory / CHECKPOINT
    try:
        return int(load_checkpoint(path)["progress"]["epoch"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"--resume: {path}: no state to go on from") from error


def clear_run(directory: Path) -> None:
    """Remove what an earlier run left, so that nothing of it is taken for the new run's."""
    evaluation = (QUANTIZED, PREPARED_STATS_FILE, PARAMS_FILE, AUTO, RANKS, REPORT, RANGES, ERRORS)
    for pattern in (
        *(CHECKPOINT, BEST, CONFIG, RESULTS, "events.out.tfevents.*", f"{PICTURES}/*.png"),
        *evaluation,
    ):
        for path in directory.glob(pattern):
            path.unlink()


def clear_report(directory: Path) -> None:
    """Remove the ``--qe-report`` of an earlier evaluation, which had other settings."""
    for name in (REPORT, RANGES, ERRORS):
        (directory / name).unlink(missing_ok=True)


def drop_results_after(directory: Path, epoch: int, steps: int) -> None:
    """Remove the results of what a run did after its last checkpoint, and will do again.

    Args:
        directory: The run's directory.
        epoch: The epoch in which it goes on.
        steps: The steps of that epoch that are done.

    Raises:
        InputError: the file of results is damaged.
    """
    path = directory / RESULTS
    if not path.exists():
        return
    try:
        header, *lines = path.read_text().splitlines(keepends=True)
        rows = list(csv.DictReader([header, *lines]))
        reached = [(int(row["epoch"]), int(row["steps"])) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"--resume: {path}: no table of results: {error}") from error
    kept = [line for line, at in zip(lines, reached, strict=False) if at <= (epoch, steps)]
    if kept != lines:
        with atomic_write(path) as temporary:
            temporary.write_text("".join([header, *kept]))
