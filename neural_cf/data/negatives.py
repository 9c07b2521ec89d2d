"""Negatives: items that a user has not trained on, drawn by rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distiller.system.cli import InputError


class UnseenItems:
    """For every user, the items outside a given list, in ascending order, by rank.

    A user's sorted list t_0 < t_1 < ... has t_j - j other items below t_j. So the item of rank r outside it
    is r + |{j : t_j - j <= r}|: one binary search, exact, with no rejected draws.

    Args:
        users: (P,) user ids.
        items: (P,) item ids, a pair with each user id. A repeated pair counts once.
        nb_users: U.
        nb_items: I.
        device: Where look-ups run.
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
        self.counts = torch.from_numpy(nb_items - listed).to(device)  # (U,) int64: items outside the list

    def item(self, users: Tensor, ranks: Tensor) -> Tensor:
        """The items outside the users' lists that have the given ranks.

        Args:
            users: (N,) int64.
            ranks: (N,) int64, each in [0, ``counts[user]``).

        Returns:
            (N,) int64.
        """
        below = torch.searchsorted(self._keys, users * self._stride + ranks, right=True)
        return ranks + below - self._start[users]


USERS_PER_BLOCK = 2048  # 2 M negatives at 999 each: 16 MB as int64


def draw_negatives(
    candidates: UnseenItems, nb_negatives: int, seed: int | list[int], distinct: bool
) -> Iterator[np.ndarray]:
    """Yield negatives, (up to ``USERS_PER_BLOCK``, C) int64, user after user.

    Each user's draws are ``RandomState(seed).randint(0, m, size=C)``, the ranks of the negatives among her m
    candidates in ascending order: what the original draws. ``distinct`` draws ranks without replacement.
    """
    random = np.random.RandomState(seed)
    counts = candidates.counts.numpy()
    for start in tqdm(range(0, len(counts), USERS_PER_BLOCK), desc="negatives", unit="block"):
        block = counts[start : start + USERS_PER_BLOCK]
        if distinct:
            ranks = np.stack([random.choice(count, nb_negatives, replace=False) for count in block])
        else:
            ranks = np.stack([random.randint(0, count, size=nb_negatives) for count in block])
        users = torch.arange(start, start + len(block)).repeat_interleave(nb_negatives)
        items = candidates.item(users, torch.from_numpy(ranks.astype(np.int64)).flatten())
        yield items.view(len(block), nb_negatives).numpy()


def keep(blocks: Iterable[np.ndarray], into: np.ndarray) -> Iterator[np.ndarray]:
    """Pass blocks of rows on and leave them in ``into``, one after the other."""
    start = 0
    for block in blocks:
        into[start : start + len(block)] = block
        start += len(block)
        yield block


def check_unrated(path: Path, unrated: np.ndarray, user_ids: np.ndarray, needed: int) -> None:
    """Raise an ``InputError`` that names a user with fewer than ``needed`` unrated items."""
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
