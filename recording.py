"""What a run leaves behind, in one directory: log, configuration, results, TensorBoard events."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset import Split
from distiller.checkpoint import load_checkpoint, save_checkpoint
from distiller.cli import InputError
from distiller.files import atomic_write, file_digest, remove_parts
from distiller.locks import LockHeldError, locked
from distiller.naming import errors_named
from distiller.quantization.histogram import Histogram
from distiller.quantization.post_train import PARAMS_FILE, STATS_FILE, PostTrainLinearQuantizer
from distiller.quantization.saved import content_of
from distiller.quantization.statistics import Statistics

CHECKPOINT, BEST, QUANTIZED = "checkpoint.pth.tar", "best.pth.tar", "quantized.pth.tar"
AUTO = "quant_auto.yaml"
CONFIG, RESULTS, LOG, RANKS = "config.json", "valid_results.csv", "ncf.log", "ranks.npy"
LOCK = ".lock"
REPORT, RANGES, ERRORS = "quant_report.csv", "quant_ranges.png", "quant_errors.png"

PICTURES = "histograms"
RUNS = Path("run/neumf")
WEIGHT_BINS = 200  # one for every three pixels of a picture

log = logging.getLogger("ncf")


class _Results(logging.StreamHandler):
    """Standard output, whose errors end the run, where logging would show a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def show_messages(prog: str = "ncf.py") -> None:
    """Send messages of a program and of ``distiller`` to stdout, warnings to stderr in the errors' form."""
    results = _Results(sys.stdout)
    results.setFormatter(logging.Formatter("%(message)s"))
    results.addFilter(lambda record: logging.INFO <= record.levelno < logging.WARNING)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setFormatter(logging.Formatter(f"{prog}: warning: %(message)s"))
    warnings.setLevel(logging.WARNING)
    for name in ("ncf", "distiller"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.handlers = [results, warnings]
        logger.propagate = False


@contextmanager
def run_directory(out_dir: str | None, name: str | None) -> Iterator[Path]:
    """The run's directory, made where it is missing, and no other process's while it lasts.

    On leaving, directories that were made and have stayed empty are removed.

    Args:
        out_dir: The directory; by default a fresh one below ``RUNS``, named by date and time.
        name: Put before the date in a fresh directory's name.

    Raises:
        InputError: another run has it.
        OSError: it cannot be made or written.
    """
    wanted = RUNS if out_dir is None else Path(out_dir)
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


class _LogFile(logging.FileHandler):
    """A log file whose errors end the run, where logging would show a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # it has ended the run already
            super().close()


def start_log(directory: Path, device: torch.device) -> None:
    """Start a run's log, with versions, machine and command line at its head; an earlier run's ends.

    Args:
        directory: The run's.
        device: What the run computes on.

    Raises:
        OSError: it cannot be written.
    """
    handler = _LogFile(directory / LOG, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger_name in ("ncf", "distiller"):
        logger = logging.getLogger(logger_name)
        for earlier in [other for other in logger.handlers if isinstance(other, _LogFile)]:
            logger.removeHandler(earlier)
            earlier.close()
        logger.addHandler(handler)
    log.debug("command: %s", command_line())
    log.debug("python %s, torch %s, numpy %s", platform.python_version(), torch.__version__, np.__version__)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    log.debug(
        "machine: %s, %d processors, %d threads", platform.platform(), os.cpu_count(), torch.get_num_threads()
    )
    log.debug("device: %s%s", device, gpu)


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


def command_line() -> str:
    """This process's command line, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def write_ranks(directory: Path, ranks: Tensor) -> None:
    """Write the users' ranks of their test items, (U,) int64, 0 for the first place."""
    with atomic_write(directory / RANKS) as temporary, temporary.open("wb") as file:
        np.save(file, ranks.numpy(), allow_pickle=False)


def write_quantized(
    directory: Path,
    quantizer: PostTrainLinearQuantizer,
    float_checkpoint: str | Path,
    training: Mapping[str, Any],
    split: Split,
) -> None:
    """Write a quantized model, for ``--load``, and where it is from: what of its training reports have, too."""
    origin = {
        "arch": "NeuMF",
        "float_digest": file_digest(float_checkpoint),
        "config": dict(training),
        "data_digest": split.digest,
        "command": command_line(),
    }
    save_checkpoint(directory / QUANTIZED, origin | content_of(quantizer))


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration as JSON."""
    with atomic_write(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def holds_run(directory: Path) -> bool:
    """Whether training has left something in a directory."""
    return any((directory / name).exists() for name in (CHECKPOINT, BEST, CONFIG, RESULTS))


def epochs_done(directory: Path) -> int:
    """The epochs that a run's last checkpoint has behind it.

    Raises:
        InputError: it says nothing of that.
    """
    path = directory / CHECKPOINT
    try:
        return int(load_checkpoint(path)["progress"]["epoch"])
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"--resume: {path}: no state to go on from") from error


def clear_run(directory: Path) -> None:
    """Remove what an earlier run left, so that nothing of it is taken for the new one's."""
    evaluation = (QUANTIZED, STATS_FILE, PARAMS_FILE, AUTO, RANKS, REPORT, RANGES, ERRORS)
    for pattern in (
        *(CHECKPOINT, BEST, CONFIG, RESULTS, "events.out.tfevents.*", f"{PICTURES}/*.png"),
        *evaluation,
    ):
        for path in directory.glob(pattern):
            path.unlink()


def clear_report(directory: Path) -> None:
    """Remove the report of an evaluation before, with other settings."""
    for name in (REPORT, RANGES, ERRORS):
        (directory / name).unlink(missing_ok=True)


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib(flag: str) -> None:
    """Raise an ``InputError`` where there is no matplotlib to draw ``flag``'s pictures with."""
    if not has_matplotlib():
        raise InputError(f"{flag} draws pictures with matplotlib: pip install matplotlib")


def drop_results_after(directory: Path, epoch: int, steps: int) -> None:
    """Remove the results of what a run did after its last checkpoint, and now does again.

    Args:
        directory: The run's.
        epoch: Where it goes on.
        steps: Likewise, steps done in that epoch.

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


class Recorder:
    """Records into a run's directory: a CSV row per epoch, TensorBoard events, pictures.

    Args:
        directory: The run's.
        pictures: Record histograms of weights after each epoch, to TensorBoard and as a picture per layer.
        step: Steps done by the run that goes on; TensorBoard drops what is recorded of later ones.
    """

    def __init__(self, directory: Path, pictures: bool = False, step: int = 0):
        # Imported here: it takes a second that evaluation and calibration need not wait.
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        self.pictures = pictures
        with errors_named(self.directory):
            self.writer = SummaryWriter(str(directory.resolve()), purge_step=step + 1 if step else None)

    def __enter__(self) -> Recorder:
        self._excepthook = threading.excepthook
        threading.excepthook = self._not_of_files
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with errors_named(self.directory):
                self.writer.close()
        except OSError:
            if kind is None:  # else it has been said already
                raise
        finally:
            threading.excepthook = self._excepthook

    def _not_of_files(self, failed: threading.ExceptHookArgs) -> None:
        """Pass over a file's error in TensorBoard's thread: the next write raises it again."""
        if not issubclass(failed.exc_type, OSError):
            self._excepthook(failed)

    def scalars(self, step: int, **values: float) -> None:
        """Record values against the number of training steps done."""
        with errors_named(self.directory):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write TensorBoard's events out."""
        with errors_named(self.directory):
            self.writer.flush()

    def epoch(self, row: Mapping[str, float]) -> None:
        """Append a row to ``valid_results.csv``; the first one brings the header."""
        path = self.directory / RESULTS
        before = path.read_text() if path.exists() else ""
        with atomic_write(path) as temporary, temporary.open("w") as file:
            file.write(before)
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if not before:
                writer.writeheader()
            writer.writerow(row)

    def weights(self, model: nn.Module, epoch: int) -> None:
        """Record histograms of a model's weights, where pictures are asked for."""
        if not self.pictures:
            return
        for name, parameter in model.named_parameters():
            if not parameter.numel():  # of a branch that is left out
                continue
            values = parameter.detach().float().cpu()
            with errors_named(self.directory):
                self.writer.add_histogram(f"weights/{name}", values, epoch)
            low, high = (bound.item() for bound in values.aminmax())
            histogram = Histogram(low, high, torch.histc(values, WEIGHT_BINS, low, high))
            self._picture(name, f"{name}, after epoch {epoch}", histogram)

    def activations(self, statistics: Statistics) -> None:
        """Record histograms of layers' outputs, from calibrated statistics that have them."""
        for name, entry in statistics.items():
            histogram = Histogram.from_plain(entry["output"]["histogram"])
            counts, centers = histogram.counts, histogram.centers.double()
            with errors_named(self.directory):
                self.writer.add_histogram_raw(
                    f"activations/{name}",
                    min=histogram.min,
                    max=histogram.max,
                    num=counts.sum().item(),
                    sum=(counts * centers).sum().item(),
                    sum_squares=(counts * centers.square()).sum().item(),
                    bucket_limits=histogram.edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                )
            self._picture(name, f"output of {name}", histogram)
        self.flush()

    def _picture(self, name: str, title: str, histogram: Histogram) -> None:
        """Draw a histogram to a file of its own, with counts on a log scale: rare values set the range."""
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
        axes.stairs(histogram.counts.numpy(), histogram.edges.numpy(), fill=True)
        axes.set(title=title, xlabel="value", ylabel="count", yscale="log", ylim=(0.5, None))
        path = self.directory / PICTURES / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
