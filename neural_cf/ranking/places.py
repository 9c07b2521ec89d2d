"""Where users' test items rank, among sampled candidates (He et al. 2017, section 4.1) or among all items.

Shapes: U users, B users in a block, C candidates per user, the last one the test item; L items of a user's list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neural_cf.ranking.candidates import Candidates, score_full, score_sampled
from neural_cf.ranking.metrics import Metrics, metrics_of_ranks
from neural_cf.ranking.scorers import Scorer, check_finite_scores
from neural_cf.runs.processes import Processes
from neural_cf.runs.progress_bar import progress_bar
from neural_cf.split import Split


class Places(NamedTuple):
    """The places of users' test items among their candidates, and each user's best items.

    Attributes:
        ranks: (U,) int64, 0 for the first place: how many candidates score higher, or the same and stand earlier.
        above: (U,) int64, how many candidates score higher.
        tied: (U,) int64, how many other candidates score the same.
        best: (U, L) int64, the L best items in the order of their ranks, -1 where there are fewer.
    """

    ranks: Tensor
    above: Tensor
    tied: Tensor
    best: Tensor


# The scored candidates that a test item is ranked against, by the name of the protocol.
RANKINGS = {"sampled": score_sampled, "full": score_full}


def place_last(candidates: Candidates, length: int = 0) -> Places:
    """Return the places of each row's last item, which is the test item.

    Args:
        candidates: The candidates of B users.
        length: L, the length of the lists of best items.

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
    """Return each user's best items among those that count.

    Args:
        candidates: The candidates of B users; their scores are finite.
        length: L, the length of the lists.

    Returns:
        (B, L) int64, best first; of items with equal scores, the one that stands earlier among the candidates comes
        first. -1 where fewer than L items count.
    """
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
    """Rank every user's test item among her candidates, with a progress bar that shows the metrics so far.

    Args:
        scorer: Scores the candidates.
        split: The split that holds users and candidates.
        k: The length of the list for the progress bar's metrics.
        device: The scorer's device.
        processes: The processes that share the users; this one alone by default. Each returns the places of all
            users. The first one shows the bar, which covers only its own users until all are ranked.
        nb_users: U, how many users are ranked, from the first on; all by default.
        ranking: The protocol, a key of ``RANKINGS``.
        length: L, the length of the lists of best items.

    Returns:
        The places of U users, on the CPU.

    Raises:
        InputError: a score is not finite.
    """
    processes = processes or Processes()
    nb_users = nb_users or split.nb_users
    users = processes.share(nb_users)
    shapes = [(nb_users,)] * 3 + [(nb_users, length)]
    places = Places(*(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes))
    done = users.start
    with progress_bar(len(users), "Evaluate", "user", disable=not processes.first) as bar:
        if getattr(scorer, "compiled", False):
            bar.set_postfix_str("compiling ...")
        for candidates in RANKINGS[ranking](scorer, split, users, device):
            count = len(candidates.items)
            for whole, block in zip(places, place_last(candidates, length), strict=True):
                whole[done : done + count] = block
            if done == users.start:
                bar.set_postfix_str("", refresh=False)
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
    """Return only the ranks, (U,) int64 on the CPU; arguments and errors are those of ``place_test_items``."""
    return place_test_items(scorer, split, k, device, processes, nb_users, ranking).ranks


def evaluate(
    scorer: Scorer,
    split: Split,
    k: int = 10,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    nb_users: int | None = None,
) -> Metrics:
    """Return the metrics at k of sampled ranking; arguments and errors are those of ``place_test_items``."""
    return metrics_of_ranks(rank_test_items(scorer, split, k, device, processes, nb_users), k)
