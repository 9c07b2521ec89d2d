"""Negatives: items outside a user's list, drawn by their rank among all such items.

Shapes: U users, I items, P pairs, N draws, C negatives per user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distiller.system.cli import InputError
from neural_cf.runs.progress_bar import progress_bar

USERS_PER_BLOCK = 2048  # 2 M negatives at 999 each: 16 MB as int64


class UnseenItems:
    """A look-up of the items outside every user's list, by rank in ascending order.

    If a user's sorted list is t_0 < t_1 < ..., then t_j - j items outside it are below t_j. So the item of rank r
    outside the list is r + |{j : t_j - j <= r}|, which takes one binary search, is exact and rejects no draws.

    Args:
        users: (P,) user ids of the pairs that make up the lists.
        items: (P,) item ids of the pairs. A repeated pair counts once.
        nb_users: U, the number of users.
        nb_items: I, the number of items.
        device: The device that look-ups run on.

    Attributes:
        counts: (U,) int64, the number of items outside each user's list.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        nb_users: int,
        nb_items: int,
        device: torch.device | str = "cpu",
    ):
        pairs = users.astype(np.int64) * nb_items + items
        pairs.sort()
        pairs = pairs[np.insert(pairs[1:] != pairs[:-1], 0, True)]
        sorted_users = pairs // nb_items
        listed = np.bincount(sorted_users, minlength=nb_users)
        start = np.cumsum(listed) - listed
        # A stride of I keeps a user's values, t_j - j in 0 .. I - 1, apart from the next user's.
        self._stride = nb_items
        below = pairs - sorted_users * nb_items - (np.arange(len(pairs)) - start[sorted_users])
        self._keys = torch.from_numpy(sorted_users * self._stride + below).to(device)
        self._start = torch.from_numpy(start).to(device)
        self.counts = torch.from_numpy(nb_items - listed).to(device)

    def item(self, users: Tensor, ranks: Tensor) -> Tensor:
        """Return the items of the given ranks outside the users' lists.

        Args:
            users: (N,) int64 row numbers of the users.
            ranks: (N,) int64 ranks, each in [0, ``counts[user]``).

        Returns:
            (N,) int64 row numbers of the items.
        """
        below = torch.searchsorted(self._keys, users * self._stride + ranks, right=True)
        return ranks + below - self._start[users]


def draw_negatives(
    candidates: UnseenItems, nb_negatives: int, seed: int | list[int], distinct: bool
) -> Iterator[np.ndarray]:
    """Draw negatives for all users and yield them in blocks of up to ``USERS_PER_BLOCK`` users, (users, C) int64.

    For each user in turn, the ranks of the negatives among the user's m candidates are ``randint(0, m, size=C)`` of one
    ``RandomState(seed)``. These are the draws of the original implementation.

    Args:
        candidates: The items outside every user's list, which negatives are drawn from.
        nb_negatives: C, the number of negatives of each user.
        seed: The seed of ``RandomState``.
        distinct: Draw ranks without replacement.
    """
    random = np.random.RandomState(seed)
    counts = candidates.counts.numpy()
    starts = range(0, len(counts), USERS_PER_BLOCK)
    with progress_bar(len(starts), "negatives", "block") as bar:
        for start in starts:
            block = counts[start : start + USERS_PER_BLOCK]
            if distinct:
                ranks = np.stack([random.choice(count, nb_negatives, replace=False) for count in block])
            else:
                ranks = np.stack([random.randint(0, count, size=nb_negatives) for count in block])
            users = torch.arange(start, start + len(block)).repeat_interleave(nb_negatives)
            items = candidates.item(users, torch.from_numpy(ranks.astype(np.int64)).flatten())
            yield items.view(len(block), nb_negatives).numpy()
            bar.update()


def keep(blocks: Iterable[np.ndarray], into: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of rows, after copying each into the next rows of ``into``."""
    start = 0
    for block in blocks:
        into[start : start + len(block)] = block
        start += len(block)
        yield block


def check_unrated(path: Path, unrated: np.ndarray, user_ids: np.ndarray, needed: int) -> None:
    """Raise an ``InputError`` that names a user with fewer than ``needed`` unrated items, if there is one.

    Args:
        path: The ratings file, for the message.
        unrated: (U,) the number of items that each user has not rated.
        user_ids: (U,) the users' ids in the ratings file.
        needed: The number of unrated items that every user needs.
    """
    short = np.flatnonzero(unrated < needed)
    if not short.size:
        return
    user, count = user_ids[short[0]], unrated[short[0]]
    if not count:
        raise InputError(
            f"{path}: user {user} has rated every item: nothing is left to rank the test item against"
        )
    raise InputError(
        f"--distinct-negatives: {path}: user {user} has {count} unrated items, -n/--negatives asks for {needed}"
    )
