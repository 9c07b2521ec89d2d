"""The best items that users have not rated, by original ids, from a trained or a quantized model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distiller.system.cli import InputError
from neural_cf.ranking.scorers import Scorer, check_finite_scores
from neural_cf.split import Split

PAIRS_AT_ONCE = 1 << 20  # whose scores are held at a time: 4 MB


@dataclass(frozen=True)
class Recommendation:
    """An item for a user.

    Attributes:
        user: Original id.
        rank: 1 for the best.
        item: Original id.
        score: The model's probability.
        title: None where it is not known.
    """

    user: int
    rank: int
    item: int
    score: float
    title: str | None


@torch.inference_mode()
def scores_of_all(scorer: Scorer, users: Tensor, nb_items: int) -> Tensor:
    """The probabilities (B, I) of all items for users (B,) int64, computed in blocks of items."""
    block = max(1, PAIRS_AT_ONCE // len(users))
    parts = [
        scorer(users, torch.arange(start, min(start + block, nb_items)).expand(len(users), -1))
        for start in range(0, nb_items, block)
    ]
    return torch.cat(parts, dim=1)


def rated_items(split: Split, user: int) -> Tensor:
    """All items that a user has rated, the held-out one too: (R,) int64."""
    trained = split.train_items[split.train_users == user]
    return torch.from_numpy(np.append(trained, split.test_items[user]).astype(np.int64))


def best_unseen(
    scorer: Scorer, split: Split, users: list[int], n: int
) -> list[tuple[list[int], list[float]]]:
    """Every user's n best items that she has not rated, fewer where there are fewer, and their scores.

    Where scores tie, the item of the lower number comes first.

    Args:
        scorer: What scores.
        split: Who has rated what.
        users: Numbers in the split.
        n: The lists' length.

    Raises:
        InputError: a score is not finite.
    """
    result = []
    at_once = max(1, PAIRS_AT_ONCE // split.nb_items)
    for start in range(0, len(users), at_once):
        some = users[start : start + at_once]
        scores = scores_of_all(scorer, torch.tensor(some), split.nb_items)
        check_finite_scores(scores)
        for user, row in zip(some, scores, strict=True):
            unseen = torch.ones(split.nb_items, dtype=torch.bool)
            unseen[rated_items(split, user)] = False
            items = unseen.nonzero()[:, 0]
            values, places = row[items].sort(descending=True, stable=True)
            result.append((items[places[:n]].tolist(), values[:n].tolist()))
    return result


def numbers_of_users(split: Split, ids: list[int], directory: Path) -> list[int]:
    """The users' numbers in a split by their original ids.

    Raises:
        InputError: an id that the split has not, or the split keeps no ids.
    """
    if split.user_ids is None or split.item_ids is None:
        raise InputError(
            f"{directory} was read from CSV files, which have no original ids: convert the ratings again, by convert.py"
        )
    numbers = {user: number for number, user in enumerate(split.user_ids.tolist())}
    for user in ids:
        if user not in numbers:
            raise InputError(f"--user: {directory} has no user {user}")
    return [numbers[user] for user in ids]


def recommend(
    scorer: Scorer, split: Split, ids: list[int], numbers: list[int], n: int, titles: dict[int, str]
) -> list[Recommendation]:
    """Every user's best items, one user after the other; arguments and errors are those of ``best_unseen``."""
    result = []
    for user, (items, scores) in zip(ids, best_unseen(scorer, split, numbers, n), strict=True):
        for rank, (number, score) in enumerate(zip(items, scores, strict=True), start=1):
            item = split.item_ids[number].item()
            result.append(Recommendation(user, rank, item, score, titles.get(item)))
    return result
