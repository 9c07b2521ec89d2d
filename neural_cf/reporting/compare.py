"""Comparing two evaluations of the same data: differences of metrics, McNemar's test, overlap of top-k lists.

Shapes: U users, B users in a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distiller.system.cli import InputError
from neural_cf.ranking.candidates import sorted_rows
from neural_cf.ranking.metrics import values_of_ranks
from neural_cf.ranking.significance import bootstrap_interval_of_few, mcnemar
from neural_cf.reporting.evaluation_report import BOOTSTRAP_SEED
from neural_cf.reporting.report_reader import Evidence

COLUMNS = ("", "A", "B", "B - A", "95 % interval", "only A hits", "only B hits", "McNemar's p")
ITEMS_AT_ONCE = 1 << 20  # of each model's lists: 16 MB of both


def conditions(evidence: Evidence) -> dict[str, Any]:
    """Return, by name, what must be the same in two evaluations for their ranks to be comparable."""
    data = evidence.content["data"]
    return {"data": data["digest"], "users": data["users"]} | {
        f"protocol: {key}": value for key, value in sorted(evidence.content["protocol"].items())
    }


def check_comparable(a: Evidence, b: Evidence) -> list[int]:
    """Return the cut-offs that two evaluations have in common.

    Raises:
        InputError: the evaluations are not comparable; the message names what differs.
    """
    ours, theirs = conditions(a), conditions(b)
    for key in (*ours, *(key for key in theirs if key not in ours)):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{a.path} and {b.path} do not compare: {key} is {ours.get(key)!r} and {theirs.get(key)!r}"
            )
    common = [k for k in a.cutoffs if k in b.cutoffs]
    if not common:
        raise InputError(f"{a.path} and {b.path} do not compare: -k is {a.cutoffs} and {b.cutoffs}")
    return common


def overlaps(a: Tensor, b: Tensor, k: int) -> np.ndarray:
    """Return each user's overlap coefficient of two top-k lists: their common items over the shorter list's length.

    Args:
        a: (U, k or more) int64, the first model's lists, best first, -1 where there are no more items.
        b: The second model's lists, in the same form.
        k: The length of the lists that are compared.

    Returns:
        (U,) float64.
    """
    a, b = a[:, :k], b[:, :k]
    users = max(1, ITEMS_AT_ONCE // k)
    blocks = zip(a.split(users), b.split(users), strict=True)
    shared = torch.cat([shared_items(of_a, of_b) for of_a, of_b in blocks])
    lengths = (a >= 0).sum(1).minimum((b >= 0).sum(1))
    return (shared / lengths).double().numpy()


def shared_items(a: Tensor, b: Tensor) -> Tensor:
    """Return how many items each row of ``a`` shares with that of ``b``, (B,) int64; no row repeats an item."""
    both = sorted_rows(torch.cat([a, b], dim=1))
    return ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)


def rows_at(a: Evidence, b: Evidence, k: int) -> list[tuple[str, ...]]:
    """Return the table's rows at a cut-off, one for each metric, with the cells of ``COLUMNS``."""
    rows = []
    values = [values_of_ranks(evidence.places.ranks, k) for evidence in (a, b)]
    hits = [of["hr"].numpy() > 0 for of in values]
    for metric, of_a in values[0].items():
        first, second = of_a.numpy(), values[1][metric].numpy()
        low, high = bootstrap_interval_of_few(second - first, BOOTSTRAP_SEED)
        row = (
            f"{metric.upper()}@{k}",
            f"{first.mean():.4f}",
            f"{second.mean():.4f}",
            f"{(second - first).mean():+.4f}",
            f"[{low:+.4f}, {high:+.4f}]",
        )
        only = (hits[0] & ~hits[1]).sum(), (hits[1] & ~hits[0]).sum()
        tests = (*map(str, only), f"{mcnemar(*hits):.2g}") if metric == "hr" else ("",) * 3
        rows.append((*row, *tests))
    return rows


def comparison(a: Evidence, b: Evidence) -> str:
    """Return the comparison of two evaluations as text: the models, a table of metrics and the overlap of lists.

    Raises:
        InputError: the evaluations are not comparable.
    """
    cutoffs = check_comparable(a, b)
    protocol = a.content["protocol"]
    lines = [
        f"{name}: {e.path}: {e.content['model']['checkpoint']}, {e.content['model'].get('computed', 'unknown')}"
        for name, e in (("A", a), ("B", b))
    ]
    lines += [f"{a.content['data']['users']} users, {protocol['ranking']} ranking", ""]
    rows = [COLUMNS, *(row for k in cutoffs for row in rows_at(a, b, k))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    lines.append("")
    for k in cutoffs:
        overlap = overlaps(a.places.best, b.places.best, k).mean()
        lines.append(f"Top-{k} lists: mean overlap coefficient {overlap:.4f}")
    return "\n".join(lines)
