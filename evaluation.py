"""HR@k and NDCG@k over candidate lists (He et al. 2017, section 4.1), users in blocks.

Shapes: U users, B users in a block, C = candidates per user: the negatives, then the test item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Split
from distiller.cli import InputError
from distiller.memory import MEMORY_ERRORS
from processes import Processes
from scoring import InParts, PairScorer, Scorer, fewer_users

# Pairs ranked at once: a second's work of a processor at most, and little memory.
PAIRS_PER_BLOCK = {"cpu": 64_000, "cuda": 1_000_000}


@dataclass(frozen=True)
class Metrics:
    """What a model ranks its users' test items at, over all users.

    Attributes:
        k: The list's length.
        hr: Share of users whose test item is among the first k.
        ndcg: Mean of log 2 / log(rank + 2) over users, 0 where the rank is k or more.
    """

    k: int
    hr: float
    ndcg: float

    def __str__(self) -> str:
        return f"HR@{self.k} = {self.hr:.4f}, NDCG@{self.k} = {self.ndcg:.4f}"


def metrics_of_ranks(ranks: Tensor, k: int) -> Metrics:
    """HR@k and NDCG@k of (U,) integer ranks, 0 for the first place, in float64."""
    return Metrics(k, (ranks < k).double().mean().item(), gains_of_ranks(ranks, k).mean().item())


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


def rank_last(items: Tensor, scores: Tensor) -> Tensor:
    """The rank of each row's last item, the test item.

    Repeated items count once, at their first place. The rank is the number of candidates that score higher,
    or equal and stand earlier.

    Args:
        items: (B, C) int64.
        scores: (B, C).

    Returns:
        (B,) int64.

    Raises:
        InputError: a score is not finite, so that it has no rank.
    """
    if not torch.isfinite(scores).all():
        raise InputError("the model's scores are not finite: its weights are damaged or training diverged")
    place = (items == items[:, -1:]).to(torch.int8).argmax(dim=1, keepdim=True)
    score = scores.gather(1, place)
    places = torch.arange(items.shape[1], device=items.device)
    ahead = (scores > score) | ((scores == score) & (places < place))
    return (ahead & first_places(items)).sum(dim=1)


def rank_test_items(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
) -> Tensor:
    """Rank every user's test item among her candidates, under a progress bar with the metrics so far.

    Args:
        scorer: What scores candidates.
        split: Users and candidates.
        k: The list's length, of the bar's metrics.
        device: The scorer's.
        processes: That share the users. Each returns the ranks of all of them; the bar is the first one's, and
            has its own users' alone.
        nb_users: U, the first so many; all of them by default.

    Returns:
        (U,) int64 on the CPU, 0 for the first place.

    Raises:
        InputError: a score is not finite.
    """
    processes = processes or Processes()
    nb_users = nb_users or split.nb_users
    users = processes.share(nb_users)
    ranks = torch.zeros(nb_users, dtype=torch.int64, device=device)
    done = users.start
    bar = tqdm(total=len(users), desc="Evaluate", unit="user", mininterval=0.5, disable=not processes.first)
    rank_in_parts = InParts(PAIRS_PER_BLOCK)
    with bar:
        for items, scores in score_candidates(scorer, split, users, device):
            ranks[done : done + len(items)] = rank_in_parts(rank_last, items, scores)
            done += len(items)
            if bar.update(len(items)):
                bar.set_postfix_str(str(metrics_of_ranks(ranks[users.start : done], k)), refresh=False)
        processes.sum([ranks])
        ranks = ranks.cpu()
        bar.set_postfix_str(str(metrics_of_ranks(ranks, k)))
    return ranks


def evaluate(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
) -> Metrics:
    """HR@k and NDCG@k over all users; arguments and errors are those of ``rank_test_items``."""
    return metrics_of_ranks(rank_test_items(scorer, split, k, device, processes, nb_users), k)
