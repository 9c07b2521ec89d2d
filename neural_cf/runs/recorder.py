"""Records of a run, epoch by epoch: a row of results, TensorBoard events, pictures."""

from __future__ import annotations

import csv
import importlib.util
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from distiller.quantization.histogram import Histogram
from distiller.quantization.statistics import Statistics
from distiller.system.cli import InputError
from distiller.system.files import atomic_write
from distiller.system.naming import errors_named
from neural_cf.runs.directory import (
    PICTURES,
    RESULTS,
)

WEIGHT_BINS = 200  # one for every three pixels of a picture


def has_matplotlib() -> bool:
    """Return whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib(flag: str) -> None:
    """Raise an ``InputError`` that names ``flag`` if there is no matplotlib to draw its pictures with."""
    if not has_matplotlib():
        raise InputError(f"{flag} draws pictures with matplotlib: pip install matplotlib")


class Recorder:
    """A recorder of a run into its directory: a CSV row per epoch, TensorBoard events, pictures.

    Args:
        directory: The run's directory.
        pictures: Record histograms of weights after each epoch, to TensorBoard and as a picture per layer.
        step: The steps that a resumed run has done; TensorBoard drops what it has of later ones.
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
        """Ignore a file's error in TensorBoard's thread: the next write raises it again."""
        if not issubclass(failed.exc_type, OSError):
            self._excepthook(failed)

    def scalars(self, step: int, **values: float) -> None:
        """Record values at a number of training steps done."""
        with errors_named(self.directory):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write TensorBoard's events out."""
        with errors_named(self.directory):
            self.writer.flush()

    def epoch(self, row: Mapping[str, float]) -> None:
        """Append a row to ``valid_results.csv``; the first row brings the header."""
        path = self.directory / RESULTS
        before = path.read_text() if path.exists() else ""
        with atomic_write(path) as temporary, temporary.open("w") as file:
            file.write(before)
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if not before:
                writer.writeheader()
            writer.writerow(row)

    def weights(self, model: nn.Module, epoch: int) -> None:
        """Record histograms of a model's weights, if pictures are asked for."""
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
        """Record histograms of layers' outputs, from calibrated statistics that have histograms."""
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
        """Draw a histogram to a file of its own, with counts on a log scale because rare values set the range."""
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
        axes.stairs(histogram.counts.numpy(), histogram.edges.numpy(), fill=True)
        axes.set(title=title, xlabel="value", ylabel="count", yscale="log", ylim=(0.5, None))
        path = self.directory / PICTURES / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")
