"""HR@k (hit rate), NDCG@k and MRR@k of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """What a model ranks its users' test items at, over all users.

    Attributes:
        k: The list's length.
        hr: Share of users whose test item is among the first k.
        ndcg: Mean of log 2 / log(rank + 2) over users, 0 where the rank is k or more.
        mrr: Mean of 1 / (rank + 1), likewise.
    """

    k: int
    hr: float
    ndcg: float
    mrr: float

    def __str__(self) -> str:
        return f"HR@{self.k} = {self.hr:.4f}, NDCG@{self.k} = {self.ndcg:.4f}"


def metrics_of_ranks(ranks: Tensor, k: int) -> Metrics:
    """HR@k, NDCG@k and MRR@k of (U,) integer ranks, 0 for the first place, in float64."""
    return Metrics(k, **{name: values.mean().item() for name, values in values_of_ranks(ranks, k).items()})


def values_of_ranks(ranks: Tensor, k: int) -> dict[str, Tensor]:
    """Every user's own hr, ndcg and mrr at k, (U,) float64 each."""
    hits = (ranks < k).double()
    return {"hr": hits, "ndcg": gains_of_ranks(ranks, k), "mrr": hits / (ranks + 1)}


def describe(metrics: Sequence[Metrics]) -> str:
    """HR and NDCG at one cut-off; at several of them MRR too, one cut-off after the other."""
    if len(metrics) == 1:
        return str(metrics[0])
    return ", ".join(f"{at}, MRR@{at.k} = {at.mrr:.4f}" for at in metrics)


def results_of(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The same by name, for files: hr@k, ndcg@k and, at several cut-offs, mrr@k."""
    results = {}
    for at in metrics:
        results |= {f"hr@{at.k}": at.hr, f"ndcg@{at.k}": at.ndcg}
        results |= {f"mrr@{at.k}": at.mrr} if len(metrics) > 1 else {}
    return results


def gains_of_ranks(ranks: Tensor, k: int) -> Tensor:
    """Every user's own NDCG@k, (U,) float64, of (U,) integer ranks; any other shape likewise."""
    gains = torch.log(torch.tensor(2.0, dtype=torch.float64)) / torch.log(ranks.double() + 2)
    return torch.where(ranks < k, gains, 0.0)
