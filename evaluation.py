"""HR@k and NDCG@k over candidate lists (He et al. 2017, section 4.1) or over all items, users in blocks.

Shapes: U users, B users in a block, C = candidates per user: the negatives, then the test item; L items of a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from catalogue import score_catalogue
from dataset import Split
from distiller.memory import MEMORY_ERRORS
from processes import Processes
from scoring import Candidates, PairScorer, Scorer, check_finite_scores, fewer_users

# Pairs ranked at once: a second's work of a processor at most, and little memory.
PAIRS_PER_BLOCK = {"cpu": 64_000, "cuda": 1_000_000}


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


def users_per_block(split: Split, device: torch.device | str = "cpu") -> int:
    """How many users' candidates make a block of about ``PAIRS_PER_BLOCK``."""
    return max(1, PAIRS_PER_BLOCK[torch.device(device).type] // split.nb_candidates)


def first_users(split: Split, share: float) -> int:
    """How many users are a share of them, at least one; those are the first."""
    return max(1, round(share * split.nb_users))


def candidate_items(split: Split, start: int, stop: int) -> Tensor:
    """(B, C) int64: the negatives in file order, then the test item, of users ``start`` .. ``stop - 1``."""
    items = torch.empty(stop - start, split.nb_candidates, dtype=torch.int64)
    items[:, :-1] = torch.from_numpy(split.negatives[start:stop].astype("int64"))
    items[:, -1] = torch.from_numpy(split.test_items[start:stop].astype("int64"))
    return items


@torch.inference_mode()
def score_candidates(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu", retry: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score users' candidates, block by block.

    Args:
        scorer: What scores them.
        split: Whose candidates.
        users: Which users, one after the other.
        device: The scorer's.
        retry: Where memory runs out, go on with smaller blocks.

    Yields:
        Items (B, C) int64 and their scores (B, C), both on ``device``.

    Raises:
        MemoryError, RuntimeError: out of memory for a single user, or without ``retry``.
    """
    block, start = users_per_block(split, device), users.start
    while start < users.stop:
        stop = min(start + block, users.stop)
        try:
            items = candidate_items(split, start, stop).to(device)
            scores = scorer(torch.arange(start, stop, device=device), items)
        except MEMORY_ERRORS as error:
            if not retry:
                raise
            block = fewer_users(stop - start, error)
            continue
        yield items, scores
        start = stop


def score_all(model: nn.Module, split: Split, nb_users: int, device: torch.device | str = "cpu") -> None:
    """Call a model on the candidates of the first ``nb_users``, once each, for whoever watches it at that."""
    scored = score_candidates(PairScorer(model, retry=False), split, range(nb_users), device, retry=False)
    blocks = -(-nb_users // users_per_block(split, device))
    for _ in tqdm(scored, total=blocks, desc="Score test users", unit="block"):
        pass


def first_places(items: Tensor) -> Tensor:
    """(B, C) bool: whether an item stands in its row for the first time."""
    bits = items.shape[1].bit_length()
    places = torch.arange(items.shape[1], device=items.device)
    ordered = sorted_rows((items << bits) | places)
    again = (ordered[:, 1:] >> bits) == (ordered[:, :-1] >> bits)
    rows, columns = again.nonzero(as_tuple=True)
    first = torch.ones_like(items, dtype=torch.bool)
    first[rows, ordered[rows, columns + 1] & ((1 << bits) - 1)] = False
    return first


def sorted_rows(integers: Tensor) -> Tensor:
    """Each row in ascending order."""
    if integers.is_cuda:
        return integers.sort(dim=1).values
    # By vector instructions: 64 x 1000 took NumPy 0.22 ms and PyTorch, on two cores, 1.09 (2026-11-23).
    return torch.from_numpy(np.sort(integers.numpy(), axis=1))


class Places(NamedTuple):
    """Where users' test items stand among their candidates.

    Attributes:
        ranks: (U,) int64, 0 for the first place: the candidates that score higher, or equal and stand earlier.
        above: (U,) int64, the candidates that score higher.
        tied: (U,) int64, the others that score the same.
        best: (U, L) int64, the L best items by the ranks' rule, -1 where there are fewer.
    """

    ranks: Tensor
    above: Tensor
    tied: Tensor
    best: Tensor


def score_sampled(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu"
) -> Iterator[Candidates]:
    """``score_candidates``, of which a repeated item counts once, at its first place."""
    for items, scores in score_candidates(scorer, split, users, device):
        yield Candidates(items, scores, first_places(items))


# What a test item is ranked against.
RANKINGS = {"sampled": score_sampled, "full": score_catalogue}


def nb_ranked(split: Split, ranking: str) -> int:
    """How many candidates a user has at most, the test item among them."""
    return split.nb_items if ranking == "full" else split.nb_candidates


def place_last(candidates: Candidates, length: int = 0) -> Places:
    """Where each row's last item, the test item, stands.

    Args:
        candidates: Of B users.
        length: L, of the lists of best items.

    Raises:
        InputError: a score is not finite, so that it has no rank.
    """
    items, scores, counted = candidates
    check_finite_scores(scores)
    place = ((items == items[:, -1:]) & counted).to(torch.int8).argmax(dim=1, keepdim=True)
    score = scores.gather(1, place)
    equal = (scores == score) & counted
    above = ((scores > score) & counted).sum(dim=1)
    earlier = torch.arange(items.shape[1], device=items.device) < place
    ranks = above + (equal & earlier).sum(dim=1)
    return Places(ranks, above, equal.sum(dim=1) - 1, best_items(candidates, length))


def best_items(candidates: Candidates, length: int) -> Tensor:
    """Each row's best items that count, (B, ``length``) int64, the earlier one where scores tie; -1 beyond the last."""
    items, scores, counted = candidates
    best = items.new_full((len(items), length), -1)
    if length:
        order = scores.masked_fill(~counted, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        order = order[:, :length]
        best[:, : order.shape[1]] = items.gather(1, order).masked_fill(~counted.gather(1, order), -1)
    return best


def place_test_items(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
    ranking: str = "sampled",
    length: int = 0,
) -> Places:
    """Rank every user's test item among her candidates, under a progress bar with the metrics so far.

    Args:
        scorer: What scores candidates.
        split: Users and candidates.
        k: The list's length, of the bar's metrics.
        device: The scorer's.
        processes: That share the users. Each returns the places of all of them; the bar is the first one's, and
            has its own users' alone.
        nb_users: U, the first so many; all of them by default.
        ranking: One of ``RANKINGS``.
        length: L, of the lists of best items.

    Returns:
        Of U users, on the CPU.

    Raises:
        InputError: a score is not finite.
    """
    processes = processes or Processes()
    nb_users = nb_users or split.nb_users
    users = processes.share(nb_users)
    shapes = [(nb_users,)] * 3 + [(nb_users, length)]
    places = Places(*(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes))
    done = users.start
    bar = tqdm(total=len(users), desc="Evaluate", unit="user", mininterval=0.5, disable=not processes.first)
    with bar:
        for candidates in RANKINGS[ranking](scorer, split, users, device):
            count = len(candidates.items)
            for whole, block in zip(places, place_last(candidates, length), strict=True):
                whole[done : done + count] = block
            done += count
            if bar.update(count):
                metrics = metrics_of_ranks(places.ranks[users.start : done], k)
                bar.set_postfix_str(str(metrics), refresh=False)
        processes.sum(places)
        places = Places(*(part.cpu() for part in places))
        bar.set_postfix_str(str(metrics_of_ranks(places.ranks, k)))
    return places


def rank_test_items(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
    ranking: str = "sampled",
) -> Tensor:
    """The ranks of ``place_test_items``, (U,) int64 on the CPU; arguments and errors are its."""
    return place_test_items(scorer, split, k, device, processes, nb_users, ranking).ranks


def evaluate(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
) -> Metrics:
    """The metrics at k over all users, sampled; arguments and errors are those of ``place_test_items``."""
    return metrics_of_ranks(rank_test_items(scorer, split, k, device, processes, nb_users), k)
