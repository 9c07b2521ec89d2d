"""Metrics of ranks at a cut-off k: hit rate (HR), NDCG and MRR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """The ranking metrics of a model over all users; ranks start at 0.

    Attributes:
        k: The cut-off, the length of a user's list.
        hr: The share of users whose test item is among the first k.
        ndcg: The mean over users of log 2 / log(rank + 2), or of 0 where the rank is k or more.
        mrr: The mean over users of 1 / (rank + 1), or of 0 where the rank is k or more.
    """

    k: int
    hr: float
    ndcg: float
    mrr: float

    def __str__(self) -> str:
        return f"HR@{self.k} = {self.hr:.4f}, NDCG@{self.k} = {self.ndcg:.4f}"


def metrics_of_ranks(ranks: Tensor, k: int) -> Metrics:
    """Return the metrics at k of (U,) integer ranks, 0 for the first place, computed in float64."""
    return Metrics(k, **{name: values.mean().item() for name, values in values_of_ranks(ranks, k).items()})


def values_of_ranks(ranks: Tensor, k: int) -> dict[str, Tensor]:
    """Return each user's own hr, ndcg and mrr at k, (U,) float64 each, from (U,) integer ranks."""
    hits = (ranks < k).double()
    return {"hr": hits, "ndcg": gains_of_ranks(ranks, k), "mrr": hits / (ranks + 1)}


def describe(metrics: Sequence[Metrics]) -> str:
    """Return metrics as a line of text: HR and NDCG at a single cut-off, and MRR too where there are several."""
    if len(metrics) == 1:
        return str(metrics[0])
    return ", ".join(f"{at}, MRR@{at.k} = {at.mrr:.4f}" for at in metrics)


def results_of(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Return metrics by the names that files have: hr@k and ndcg@k, and mrr@k where there are several cut-offs."""
    results = {}
    for at in metrics:
        results |= {f"hr@{at.k}": at.hr, f"ndcg@{at.k}": at.ndcg}
        results |= {f"mrr@{at.k}": at.mrr} if len(metrics) > 1 else {}
    return results


def gains_of_ranks(ranks: Tensor, k: int) -> Tensor:
    """Return the NDCG@k of each rank, in float64 and in the shape of the ranks."""
    gains = torch.log(torch.tensor(2.0, dtype=torch.float64)) / torch.log(ranks.double() + 2)
    return torch.where(ranks < k, gains, 0.0)
