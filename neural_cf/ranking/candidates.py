"""The candidates that test items are ranked against, scored block by block.

Sampled ranking takes a user's drawn negatives, full ranking all items that are not among her training items.

Shapes: U users, B users in a block, C candidates per user, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distiller.system.memory import MEMORY_ERRORS
from neural_cf.ranking.blocks import fewer_users
from neural_cf.ranking.scorers import PairScorer, Scorer
from neural_cf.runs.progress_bar import progress_bar
from neural_cf.split import Split

# Pairs of user and item in a block, by kind of device. Of sampled candidates: at most a second of a processor's work,
# and little memory. Of all items: 8 users or more up to ml-25m's items, and 8 MB of items and scores on a processor.
SAMPLED_PAIRS_PER_BLOCK = {"cpu": 64_000, "cuda": 1_000_000}
FULL_PAIRS_PER_BLOCK = {"cpu": 500_000, "cuda": 10_000_000}


class Candidates(NamedTuple):
    """The scored candidates of a block of users; where test items are ranked, each row's last item is the test item.

    Attributes:
        items: (B, C) int64.
        scores: (B, C).
        counted: (B, C) bool, whether the item takes part in the ranking. In each row an item counts once at most,
            and the test item, where it is among the candidates, exactly once.
    """

    items: Tensor
    scores: Tensor
    counted: Tensor


def users_per_block(
    candidates_per_user: int, pairs_per_block: Mapping[str, int], device: torch.device | str = "cpu"
) -> int:
    """Return how many users a block has, at least one.

    Args:
        candidates_per_user: C.
        pairs_per_block: The greatest number of pairs in a block of several users, by kind of device.
        device: The device that scores them.
    """
    return max(1, pairs_per_block[torch.device(device).type] // candidates_per_user)


def first_users(split: Split, share: float) -> int:
    """Return how many users a share of the split's users is, at least one; these are its first users."""
    return max(1, round(share * split.nb_users))


def nb_ranked(split: Split, ranking: str) -> int:
    """Return the greatest number of candidates that a user has, the test item included.

    Args:
        split: The split of the users.
        ranking: ``"full"`` or ``"sampled"``.
    """
    return split.nb_items if ranking == "full" else split.nb_candidates


# --- sampled candidates ---


def candidate_items(split: Split, start: int, stop: int) -> Tensor:
    """Return the candidates of users ``start`` .. ``stop - 1``, (B, C) int64.

    A row holds the user's negatives in the order of the file, then the test item.
    """
    items = torch.empty(stop - start, split.nb_candidates, dtype=torch.int64)
    items[:, :-1] = torch.from_numpy(split.negatives[start:stop].astype("int64"))
    items[:, -1] = torch.from_numpy(split.test_items[start:stop].astype("int64"))
    return items


@torch.inference_mode()
def score_candidates(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu", retry: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score users' sampled candidates, block by block.

    Args:
        scorer: Scores the candidates.
        split: The split that holds the candidates.
        users: The users' numbers in the split, in steps of one.
        device: The scorer's device.
        retry: Whether to go on with smaller blocks where memory runs out.

    Yields:
        Items (B, C) int64 and their scores (B, C), both on ``device``.

    Raises:
        MemoryError, RuntimeError: memory ran out even for a single user, or without ``retry``.
    """
    block, start = users_per_block(split.nb_candidates, SAMPLED_PAIRS_PER_BLOCK, device), users.start
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
    """Run a model once on each candidate of the first ``nb_users`` users, for observers that are attached to it."""
    scored = score_candidates(PairScorer(model, retry=False), split, range(nb_users), device, retry=False)
    blocks = -(-nb_users // users_per_block(split.nb_candidates, SAMPLED_PAIRS_PER_BLOCK, device))
    with progress_bar(blocks, "Score test users", "block") as bar:
        for _ in scored:
            bar.update()


def first_places(items: Tensor) -> Tensor:
    """Return whether each item (B, C) int64 stands in its row for the first time: (B, C) bool."""
    bits = items.shape[1].bit_length()
    places = torch.arange(items.shape[1], device=items.device)
    # Item and place in one integer: sorting brings equal items together, the first place first.
    ordered = sorted_rows((items << bits) | places)
    again = (ordered[:, 1:] >> bits) == (ordered[:, :-1] >> bits)
    rows, columns = again.nonzero(as_tuple=True)
    first = torch.ones_like(items, dtype=torch.bool)
    first[rows, ordered[rows, columns + 1] & ((1 << bits) - 1)] = False
    return first


def sorted_rows(integers: Tensor) -> Tensor:
    """Return a matrix of integers with each row in ascending order."""
    if integers.is_cuda:
        return integers.sort(dim=1).values
    # NumPy sorts with vector instructions: 64 x 1000 took it 0.22 ms, and PyTorch on two cores 1.09 ms (2026-11-23).
    return torch.from_numpy(np.sort(integers.numpy(), axis=1))


def score_sampled(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu"
) -> Iterator[Candidates]:
    """Score users' sampled candidates as ``score_candidates`` does; a repeated item counts once, at its first place."""
    for items, scores in score_candidates(scorer, split, users, device):
        yield Candidates(items, scores, first_places(items))


# --- all items ---


class RatedItems:
    """An index of the items that each user has rated: her training items and the held-out test item.

    Args:
        split: The split of the users.
    """

    def __init__(self, split: Split):
        order = np.argsort(split.train_users, kind="stable")
        self._trained = split.train_items[order]
        self._start = np.insert(np.bincount(split.train_users, minlength=split.nb_users).cumsum(), 0, 0)
        self._test_items = split.test_items
        self.nb_items = split.nb_items

    def test_items(self, users: Tensor) -> Tensor:
        """Return the test items of users (B,) int64: (B, 1) int64, on the users' device."""
        items = self._test_items[users.cpu().numpy()].astype(np.int64)
        return torch.from_numpy(items).to(users.device)[:, None]

    def unrated(self, users: Tensor) -> Tensor:
        """Return whether users (B,) int64 have left each item unrated: (B, I) bool, on the users' device."""
        trained = [self._trained[self._start[user] : self._start[user + 1]] for user in users.tolist()]
        counts = torch.tensor([len(items) for items in trained])
        rows = torch.arange(len(users)).repeat_interleave(counts).to(users.device)
        items = torch.from_numpy(np.concatenate(trained).astype(np.int64)).to(users.device)
        unrated = torch.ones(len(users), self.nb_items, dtype=torch.bool, device=users.device)
        unrated[rows, items] = False
        return unrated.scatter_(1, self.test_items(users), False)


@torch.inference_mode()
def score_unrated(scorer: Scorer, rated: RatedItems, users: Tensor) -> Candidates:
    """Score all items for users (B,) int64: (B, I) candidates in ascending order, of which the unrated ones count."""
    items = torch.arange(rated.nb_items, device=users.device).expand(len(users), -1)
    return Candidates(items, scorer(users, items), rated.unrated(users))


@torch.inference_mode()
def score_full(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu"
) -> Iterator[Candidates]:
    """Score all items for users, block by block.

    Args:
        scorer: Scores the items.
        split: The split of the users, whose training items do not count.
        users: The users' numbers in the split, in steps of one.
        device: The scorer's device.

    Yields:
        C = I + 1 candidates per user on ``device``: all items in ascending order, then the test item again. It counts
        only in this last place, so that ties go against it.
    """
    rated, block = RatedItems(split), users_per_block(split.nb_items, FULL_PAIRS_PER_BLOCK, device)
    for start in range(users.start, users.stop, block):
        some = torch.arange(start, min(start + block, users.stop), device=device)
        items, scores, unrated = score_unrated(scorer, rated, some)
        test_items = rated.test_items(some)
        yield Candidates(
            torch.cat([items, test_items], 1),
            torch.cat([scores, scores.gather(1, test_items)], 1),
            torch.cat([unrated, torch.ones_like(test_items, dtype=torch.bool)], 1),
        )
