"""Figures of what quantization costs. They need matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distiller.quantization.analysis import TensorErrors
from distiller.system.files import atomic_write
from neural_cf.int8.losses import Losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The tensors in which the final layer, whole or split in two, reads the MF and the MLP branch.
BRANCHES = {
    ("final_concat", "input 0"): "MF",
    ("final_concat", "input 1"): "MLP",
    ("final_mf", "input 0"): "MF",
    ("final_mlp", "input 0"): "MLP",
}
COLORS = {"input": "tab:blue", "output": "tab:orange", "weight": "tab:green"}
BARS = "thin: min to max, thick: mean ± standard deviation"
WIDTH, ROW = 11.0, 0.24  # inches


def draw_ranges(losses: Losses, path: Path) -> None:
    """Draw the range of every tensor of the quantized layers, and above them those of the two branches alone."""
    from matplotlib.figure import Figure

    tensors = losses.tensors
    with_scale = {(x.layer, x.tensor): x for x in tensors if x.scale is not None}
    branches = {name: with_scale[key] for key, name in BRANCHES.items() if key in with_scale}
    heights = [1.6 + 0.5 * len(branches)] * bool(branches) + [1.6 + ROW * len(tensors)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    *above, below = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axes in above:
        _draw_branches(axes, branches, _shared_level(tensors))
    _draw_tensors(below, tensors)
    save(figure, path)


def _shared_level(tensors: Sequence[TensorErrors]) -> float | None:
    """Return the width of a quantization level of both branches; None where they do not share one scale."""
    outputs = {(x.type, x.layer): x for x in tensors if x.tensor == "output"}
    of_both = outputs.get(("QuantizedConcat", "final_concat"))
    return of_both and 1 / of_both.scale


def _draw_branches(axes: Axes, branches: dict[str, TensorErrors], shared: float | None) -> None:
    """Draw both branches on one linear axis, with the number of quantization levels in their standard deviation.

    Args:
        axes: Where to draw.
        branches: The tensors by the branch's name.
        shared: The width of a level of both branches, or None where each branch has a scale of its own.
    """
    names = list(branches)[::-1]
    for y, name in enumerate(names):
        x = branches[name]
        _bar(axes, y, x, COLORS["input"], 0.3)
        level = shared or 1 / x.scale
        label = f"one level {level:.3g}, std {x.std:.3g} = {x.std / level:.1f} levels"
        end = max(x.max, x.mean + x.std)
        axes.annotate(label, (end, y), (8, 0), textcoords="offset points", va="center")
    of_each = "one scale for both" if shared else "a scale of its own for each"
    axes.set(
        title=f"What the final layer reads: {of_each}",
        xlabel=f"value ({BARS})",
        yticks=range(len(names)),
        yticklabels=[f"{name} branch\n({branches[name].layer} {branches[name].tensor})" for name in names],
        ylim=(-0.7, len(names) - 0.3),
    )
    low = min(min(x.min, x.mean - x.std) for x in branches.values())
    width = max(max(x.max, x.mean + x.std) for x in branches.values()) - low
    axes.set_xlim(low - 0.05 * width, low + 1.7 * width)  # leaves room for the text beside the longest bar
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)


def _draw_tensors(axes: Axes, tensors: Sequence[TensorErrors]) -> None:
    """Draw every tensor on one symmetric logarithmic axis, with the width of its quantization levels."""
    from matplotlib.patches import Patch

    places = range(len(tensors))[::-1]
    for y, x in zip(places, tensors, strict=True):
        _bar(axes, y, x, COLORS[x.tensor.split()[0]], 0.36)
        width = "-" if x.scale is None else f"{'about ' * (x.zero_point is None)}{1 / x.scale:.2g}"
        axes.text(1.01, y, width, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        if x is not tensors[0] and x.layer != tensors[len(tensors) - 2 - y].layer:
            axes.axhline(y + 0.5, color="0.85", linewidth=0.8, zorder=0)
    reaches = [reach for x in tensors if (reach := max(abs(x.min), abs(x.max)))]
    axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(min(reaches, default=1.0))))
    axes.set(
        xlabel=f"value, logarithmic but near 0 ({BARS})",
        yticks=places,
        yticklabels=[f"{x.layer} {x.tensor}" for x in tensors],
        ylim=(-0.7, len(tensors) - 0.3),
    )
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("Tensors of the quantized layers, in the float model")
    axes.text(1.01, 1.0, "one level\n(about: mean\nof several)", transform=axes.transAxes, fontsize=8)
    axes.margins(x=0.04)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(handles=[Patch(color=color, label=kind) for kind, color in COLORS.items()], fontsize=8)


def _bar(axes: Axes, y: int, x: TensorErrors, color: str, height: float) -> None:
    """Draw a thin bar from the least to the greatest value, and a thick one from mean - std to mean + std."""
    for bar in (
        axes.barh(y, x.max - x.min, height, x.min, color=color, alpha=0.35),
        axes.barh(y, 2 * x.std, 2 * height, x.mean - x.std, color=color),
    ):
        bar[0].sticky_edges.x.clear()  # sticky edges would leave no margin


def draw_errors(losses: Losses, path: Path) -> None:
    """Draw for each layer the error of its output, and the loss of HR@k where that layer alone is quantized."""
    from matplotlib.figure import Figure

    outputs = [x for x in losses.tensors if x.tensor == "output"]
    places = range(len(outputs))[::-1]
    figure = Figure(figsize=(WIDTH, 1.8 + 0.3 * len(outputs)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ratios = [x.sqnr for x in outputs]
    left.bar_label(
        left.barh(places, [x if math.isfinite(x) else 0.0 for x in ratios], color=COLORS["output"]),
        ["exact" if x == math.inf else f"{x:.1f}" for x in ratios],
        padding=3,
        fontsize=8,
    )
    left.set(title="Error of the output, the layers before included", xlabel="SQNR (dB; more is better)")
    left.set(yticks=places, yticklabels=[x.layer for x in outputs])
    _draw_losses(right, losses, [x.layer for x in outputs], places)
    for axes in (left, right):
        axes.margins(x=0.15)
    save(figure, path)


def _draw_losses(axes: Axes, losses: Losses, layers: Sequence[str], places: Sequence[int]) -> None:
    """Draw the loss of HR@k, in points, of each layer quantized alone, and of all layers together."""
    k, of_all = losses.in_float.k, 100 * (losses.in_float.hr - losses.quantized.hr)
    points = [100 * (losses.in_float.hr - losses.alone[layer].hr) for layer in layers]
    axes.bar_label(axes.barh(places, points, color="tab:red"), fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(of_all, color="0.3", linestyle="--", linewidth=1, label=f"all layers: {of_all:.2f}")
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set(
        title=f"Loss of HR@{k} with that layer alone quantized",
        xlabel=f"points of HR@{k}, {losses.nb_users} users (float: {100 * losses.in_float.hr:.2f})",
    )
    axes.legend(loc="best", fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's suffix; the same figure always gives the same bytes."""
    from matplotlib import rc_context

    kind = path.suffix[1:].lower()
    dates = {"metadata": {"Date": None}} if kind == "svg" else {}
    with atomic_write(path) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format=kind, dpi=120, **dates)
