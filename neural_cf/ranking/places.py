"""HR@k and NDCG@k over candidate lists (He et al. 2017, section 4.1) or over all items, users in blocks.

Shapes: U users, B users in a block, C = candidates per user: the negatives, then the test item; L items of a list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from neural_cf.ranking.candidates import (
    Candidates,
    score_catalogue,
    score_sampled,
)
from neural_cf.ranking.metrics import (
    Metrics,
    metrics_of_ranks,
)
from neural_cf.ranking.scorers import Scorer, check_finite_scores
from neural_cf.runs.processes import Processes
from neural_cf.split import Split


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


# What a test item is ranked against.
RANKINGS = {"sampled": score_sampled, "full": score_catalogue}


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
