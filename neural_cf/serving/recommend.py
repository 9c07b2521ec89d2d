"""Recommending: the items that a model scores best among those that a user has not rated, by original ids.

Shapes: B users in a block, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from distiller.system.cli import InputError
from neural_cf.ranking.candidates import RatedItems, score_unrated, users_per_block
from neural_cf.ranking.places import best_items
from neural_cf.ranking.scorers import Scorer, check_finite_scores
from neural_cf.split import Split

# Pairs of user and item in a block, so that memory is bounded for any number of users: 4 MB of scores, and four times
# as much while they are sorted. Recommending runs on the processor only.
PAIRS_PER_BLOCK = {"cpu": 1 << 20}


@dataclass(frozen=True)
class Recommendation:
    """An item that is recommended to a user.

    Attributes:
        user: The user's original id.
        rank: The item's place among the user's recommendations, 1 for the best.
        item: The item's original id.
        score: The probability that the model gives the item.
        title: The item's title; None where it is not known.
    """

    user: int
    rank: int
    item: int
    score: float
    title: str | None


def best_unseen(
    scorer: Scorer, split: Split, users: list[int], n: int
) -> list[tuple[list[int], list[float]]]:
    """Return for each user the n best items that she has not rated, fewer where there are fewer, and their scores.

    The held-out test item counts as rated. Where scores tie, the item of the lower number comes first.

    Args:
        scorer: Scores the items.
        split: The split that holds the users' ratings.
        users: The users' numbers in the split.
        n: The length of the lists.

    Raises:
        InputError: a score is not finite.
    """
    result = []
    rated, length = RatedItems(split), min(n, split.nb_items)
    block = users_per_block(split.nb_items, PAIRS_PER_BLOCK)
    for start in range(0, len(users), block):
        candidates = score_unrated(scorer, rated, torch.tensor(users[start : start + block]))
        check_finite_scores(candidates.scores)
        best = best_items(candidates, length)
        scores = candidates.scores.gather(1, best.clamp(min=0))
        counts = (best >= 0).sum(1).tolist()
        for items, values, count in zip(best, scores, counts, strict=True):
            result.append((items[:count].tolist(), values[:count].tolist()))
    return result


def numbers_of_users(split: Split, ids: list[int], directory: Path) -> list[int]:
    """Return the numbers that users have in a split.

    Args:
        split: The split.
        ids: The users' original ids.
        directory: The split's directory, for messages.

    Raises:
        InputError: the split keeps no original ids, or has no user of such an id.
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
    """Return all users' recommendations, one user after the other, best first.

    Args:
        scorer: Scores the items.
        split: The split that holds the users' ratings and the original ids.
        ids: The users' original ids.
        numbers: The same users' numbers in the split.
        n: How many items each user gets, fewer where fewer are unrated.
        titles: Titles by the items' original ids.

    Raises:
        InputError: a score is not finite.
    """
    result = []
    for user, (items, scores) in zip(ids, best_unseen(scorer, split, numbers, n), strict=True):
        for rank, (number, score) in enumerate(zip(items, scores, strict=True), start=1):
            item = split.item_ids[number].item()
            result.append(Recommendation(user, rank, item, score, titles.get(item)))
    return result
