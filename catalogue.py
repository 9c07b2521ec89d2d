"""Full ranking: every user's test item against all items that she has not trained on.

Shapes: U users, B users in a block, I items, T of a block's training pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dataset import Split
from scoring import Candidates, Scorer

# Pairs ranked at once: of 8 users or more up to ml-25m's items, and 8 MB of items and scores on a processor.
PAIRS_PER_BLOCK = {"cpu": 500_000, "cuda": 10_000_000}


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


def users_per_block(split: Split, device: torch.device | str = "cpu") -> int:
    """How many users' items make a block of about ``PAIRS_PER_BLOCK``."""
    return max(1, PAIRS_PER_BLOCK[torch.device(device).type] // split.nb_items)


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
    trained, block = TrainedItems(split), users_per_block(split, device)
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
