"""Full ranking: every user's test item against all items that she has not trained on.

Shapes: U users, B users in a block, I items, T of a block's training pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distiller.system.memory import MEMORY_ERRORS
from neural_cf.ranking.blocks import (
    fewer_users,
)
from neural_cf.ranking.scorers import (
    PairScorer,
    Scorer,
)
from neural_cf.split import Split


class Candidates(NamedTuple):
    """What a block of users' test items are ranked against, with scores; each row's last item is the test item.

    Attributes:
        items: (B, C) int64.
        scores: (B, C).
        counted: (B, C) bool: what is ranked, each item once in a row at most, the test item once.
    """

    items: Tensor
    scores: Tensor
    counted: Tensor


# Pairs ranked at once: a second's work of a processor at most, and little memory.
PAIRS_PER_BLOCK = {"cpu": 64_000, "cuda": 1_000_000}


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


def score_sampled(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu"
) -> Iterator[Candidates]:
    """``score_candidates``, of which a repeated item counts once, at its first place."""
    for items, scores in score_candidates(scorer, split, users, device):
        yield Candidates(items, scores, first_places(items))


def nb_ranked(split: Split, ranking: str) -> int:
    """How many candidates a user has at most, the test item among them."""
    return split.nb_items if ranking == "full" else split.nb_candidates


# Pairs ranked at once: of 8 users or more up to ml-25m's items, and 8 MB of items and scores on a processor.
FULL_PAIRS_PER_BLOCK = {"cpu": 500_000, "cuda": 10_000_000}


class TrainedItems:
    """Everyone's training items, user after user.

    Args:
        split: Whose.
    """

    def __init__(self, split: Split):
        order = np.argsort(split.train_users, kind="stable")
        self._items = split.train_items[order]
        self._start = np.insert(np.bincount(split.train_users, minlength=split.nb_users).cumsum(), 0, 0)

    def of_block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows, 0 for user ``start``, and items of users ``start`` .. ``stop - 1``: (T,) int64 each."""
        counts = np.diff(self._start[start : stop + 1])
        items = self._items[self._start[start] : self._start[stop]].astype(np.int64)
        return torch.arange(stop - start).repeat_interleave(torch.from_numpy(counts)), torch.from_numpy(items)


def users_per_full_block(split: Split, device: torch.device | str = "cpu") -> int:
    """How many users' items make a block of about ``FULL_PAIRS_PER_BLOCK``."""
    return max(1, FULL_PAIRS_PER_BLOCK[torch.device(device).type] // split.nb_items)


@torch.inference_mode()
def score_catalogue(
    scorer: Scorer, split: Split, users: range, device: torch.device | str = "cpu"
) -> Iterator[Candidates]:
    """Score all items for users, block by block.

    Args:
        scorer: What scores them.
        split: Whose training items do not count.
        users: Which users, one after the other.
        device: The scorer's.

    Yields:
        Items in ascending order, then the test item, on ``device``. It counts there, and not in its place among the
        others, so that ties go against it; training items do not count.
    """
    trained, block = TrainedItems(split), users_per_full_block(split, device)
    catalogue = torch.arange(split.nb_items, device=device)
    for start in range(users.start, users.stop, block):
        stop = min(start + block, users.stop)
        every = catalogue.expand(stop - start, -1)
        scores = scorer(torch.arange(start, stop, device=device), every)
        test_items = torch.from_numpy(split.test_items[start:stop].astype(np.int64)).to(device)[:, None]
        counted = torch.ones(stop - start, split.nb_items + 1, dtype=torch.bool, device=device)
        rows, items = (part.to(device) for part in trained.of_block(start, stop))
        counted[rows, items] = False
        counted.scatter_(1, test_items, False)
        yield Candidates(
            torch.cat([every, test_items], 1),
            torch.cat([scores, scores.gather(1, test_items)], 1),
            counted,
        )
