"""Figures for ``neural-cf plot``: training loss and HR@k by epoch, or what each precision costs.

The first are drawn from the directories of training runs, the second from the table that
``python -m benchmarks.precision --json`` prints.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from distiller.system.cli import InputError
from distiller.system.naming import errors_named, shown
from neural_cf.reporting.figures import save
from neural_cf.runs.directory import CONFIG, RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".svg")
TOP = 10  # the cut-off of the precision table's HR and NDCG
# The settings in a figure's title, where all of its runs agree on them, and how they are written there.
SETTINGS = {
    "layers": "layers {}",
    "factors": "{} factors",
    "batch_size": "batch {}",
    "learning_rate": "learning rate {}",
}
HEIGHT = 4.2  # inches
LARGEST = 1e100  # the greatest value that is drawn: far beyond any loss, and safe for matplotlib's ticks
# Every kind of colour vision tells blue and orange apart.
HR_COLOR, NDCG_COLOR, SIZE_COLOR = "tab:blue", "tab:orange", "0.6"


@dataclass(frozen=True)
class Run:
    """A training run's record, epoch by epoch.

    Attributes:
        directory: The run's directory.
        settings: The run's configuration.
        epochs: The epochs' numbers.
        losses: The mean training loss of each epoch.
        hits: HR@k after each epoch, in percent.
    """

    directory: Path
    settings: Mapping[str, Any]
    epochs: list[int]
    losses: list[float]
    hits: list[float]

    @property
    def hits_of(self) -> str:
        """The description of the run's HR@k: of which held-out items, ranked among which candidates."""
        held_out = "validation" if self.settings.get("validate") else "test"
        against = " among all" if self.settings.get("ranking") == "full" else ""
        return f"HR@{self.k} of the {held_out} items{against}"

    @property
    def k(self) -> int:
        """The k of the HR@k by which the run chooses its best epoch."""
        return self.settings["topk"]


def read_run(directory: Path) -> Run:
    """Return the run that is recorded in a directory.

    Raises:
        InputError: the directory holds no run, or a file of it is damaged.
    """
    config, results = directory / CONFIG, directory / RESULTS
    for path in (config, results):
        if not path.is_file():
            raise InputError(f"{directory}: no run of ncf.py: it has no {path.name}")
    settings = read_json(config)
    if not isinstance(settings, dict) or type(settings.get("topk")) is not int:
        raise InputError(f"{config}: no configuration of a run: it has no topk")
    columns = {"epoch": int, "avg_train_loss": float, f"hr@{settings['topk']}": float}
    epochs, losses, hits = zip(*read_columns(results, columns), strict=True)
    return Run(directory, settings, list(epochs), list(losses), [100 * hr for hr in hits])


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        InputError: the file is not JSON.
        OSError: the file cannot be read.
    """
    try:
        with errors_named(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split())}") from error


def read_columns(path: Path, columns: Mapping[str, type]) -> list[tuple]:
    """Return some columns of a CSV file with a header, row by row.

    Args:
        path: The file.
        columns: The columns' names, with the type of their values.

    Raises:
        InputError: the file lacks a column or has no rows, or a value is no number that can be drawn.
        OSError: the file cannot be read.
    """
    rows = []
    with errors_named(path), open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            for name in columns:
                if name not in (reader.fieldnames or []):
                    raise InputError(f"{path}: no column {name}")
            for row in reader:
                rows.append(tuple(kind(row[name]) for name, kind in columns.items()))
                if not all(map(is_drawable, rows[-1])):
                    raise InputError(
                        f"{path}:{reader.reader.line_num}: a value that is not finite or beyond {LARGEST:g}"
                    )
        except InputError:
            raise
        except (csv.Error, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}:{reader.reader.line_num}: a row that is no epoch's") from error
    if not rows:
        raise InputError(f"{path}: no epochs yet")
    return rows


def is_drawable(value: float) -> bool:
    """Return whether a number is finite, and not so large that matplotlib's ticks overflow."""
    return abs(value) <= LARGEST


def names_of(directories: Sequence[Path]) -> list[str]:
    """Return names that tell directories apart: their paths without the leading and trailing parts common to all.

    Raises:
        InputError: two directories are the same.
    """
    if len(directories) == 1:
        return [shown(directories[0].resolve().name)]
    parts = [path.resolve().parts for path in directories]
    if len(set(parts)) < len(parts):
        raise InputError("RUN: one directory is there twice")
    for end in (0, -1):
        while len({path[end] for path in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [path[1:] if end == 0 else path[:-1] for path in parts]
    return [shown("/".join(path)) for path in parts]


def shared_settings(runs: Sequence[Run]) -> str:
    """Return a line of those of ``SETTINGS`` that have the same value in all runs."""
    parts = []
    for name, form in SETTINGS.items():
        values = [run.settings.get(name) for run in runs]
        if values[0] is not None and all(value == values[0] for value in values):
            value = values[0]
            parts.append(form.format(" ".join(map(str, value)) if isinstance(value, list) else value))
    return shown(", ".join(parts))


def draw_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss and HR@k by epoch, with a line for each run and a mark at its best epoch.

    Raises:
        InputError: the runs' HR is not of the same items, candidates and k, or two runs are the same.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if len({run.hits_of for run in runs}) > 1:
        kinds = ", ".join(f"{run.directory} has {run.hits_of}" for run in runs)
        raise InputError(f"RUN: runs that do not compare: {kinds}")
    figure = Figure(figsize=(10.0, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = colormaps["viridis"].resampled(len(runs)).colors if len(runs) > 10 else colormaps["tab10"].colors
    names = names_of([run.directory for run in runs])
    for record, name, color in zip(runs, names, colors, strict=False):
        line = {"color": color, "linewidth": 1.5, "marker": ".", "markersize": 5}
        left.plot(record.epochs, record.losses, **line)
        best = max(range(len(record.hits)), key=record.hits.__getitem__)
        label = f"{name}: best {record.hits[best]:.2f}, epoch {record.epochs[best]}"
        right.plot(record.epochs, record.hits, label=label, **line)
        right.plot(record.epochs[best], record.hits[best], "o", color=color, markersize=8)
    penalty = " and penalty" if any(run.settings.get("l2") for run in runs) else ""
    left.set(title="Training loss", ylabel=f"mean binary cross-entropy{penalty}")
    right.set(title=runs[0].hits_of, ylabel=f"HR@{runs[0].k} (%)")
    right.legend(loc="lower right", fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
    figure.suptitle(shared_settings(runs), fontsize=9)
    save(figure, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a precision table, of which the first one is the float model's.

    Raises:
        InputError: the file holds no such table.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: no table of python -m benchmarks.precision --json: it has no rows")
    for number, row in enumerate(rows, start=1):
        if not is_row(row, first=number == 1):
            raise InputError(f"{path}: row {number} is none of python -m benchmarks.precision --json")
    return [row | {"name": shown(row["name"])} for row in rows]


def is_row(row: Any, first: bool) -> bool:
    """Return whether a row has all values that are drawn; the first one needs no difference from itself."""
    try:
        values = [*row["hr"], row["megabytes"]]
        if not first:
            difference = row["difference"]
            low, high = difference["interval"]
            values += [difference["hr"], difference["ndcg"], low, high]
        return isinstance(row["name"], str) and bool(row["hr"]) and all(map(is_drawable, values))
    except (TypeError, KeyError, ValueError, OverflowError):
        return False


def draw_precision(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw for each precision its HR, the differences of HR and NDCG from the float model's, and the model's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 1.6 + 0.42 * len(rows)), layout="constrained")
    hits, differences, sizes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 4, 2))
    places = range(len(rows))
    draw_hits(hits, rows)
    draw_differences(differences, rows)
    bars = sizes.barh(places, [row["megabytes"] for row in rows], 0.6, color=SIZE_COLOR)
    sizes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    sizes.set(title="Model", xlabel="MB")
    hits.set(yticks=places, yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    sizes.margins(x=0.2)
    save(figure, path)


def draw_hits(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw each row's HR, its mean over seeds, with the standard deviation over seeds."""
    means = [mean(row["hr"]) for row in rows]
    spreads = [stdev(row["hr"]) if len(row["hr"]) > 1 else 0.0 for row in rows]
    bars = axes.barh(range(len(rows)), means, 0.6, color=HR_COLOR)
    if any(spreads):
        axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="none", ecolor="0.2", capsize=2)
    labels = [f"{x:.2f}" for x in means]
    axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
    axes.axvline(means[0], color="0.3", linestyle="--", linewidth=1)
    seeds = len(rows[0]["hr"])
    axes.set(title=f"HR@{TOP}", xlabel=f"%, {seeds} seeds: mean ± deviation" if seeds > 1 else "%")


def draw_differences(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw how far HR and NDCG of each row are from the first row's, NDCG with its 95 % interval."""
    differences = [row["difference"] for row in rows[1:]]
    upper, lower = ([y + shift for y in range(1, len(rows))] for shift in (-0.16, 0.16))
    axes.barh(upper, [x["hr"] for x in differences], 0.3, color=HR_COLOR, label=f"HR@{TOP}")
    points = [x["ndcg"] for x in differences]
    ends = [[abs(x["ndcg"] - x["interval"][end]) for x in differences] for end in (0, 1)]
    style = {"color": NDCG_COLOR, "ecolor": "0.2", "error_kw": {"capsize": 2, "linewidth": 1}}
    axes.barh(lower, points, 0.3, xerr=ends, label=f"NDCG@{TOP}, 95 %", **style)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(title=f"Minus {rows[0]['name']}'s", xlabel="points")
    axes.legend(loc="upper left", fontsize=8)  # beside the first row, which has no bars
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def draw(sources: Sequence[Path], out: Path) -> None:
    """Draw a figure of runs, or of one precision table.

    Args:
        sources: The runs' directories, or the table's file alone.
        out: The figure's path.

    Raises:
        InputError: a source is neither of these, or the sources cannot be drawn in one figure.
    """
    tables = [path for path in sources if path.is_file()]
    if not tables:
        draw_runs([read_run(path) for path in sources], out)
    elif len(sources) == 1:
        draw_precision(read_rows(tables[0]), out)
    else:
        raise InputError(f"RUN: {tables[0]} is a file: a table is drawn alone")
