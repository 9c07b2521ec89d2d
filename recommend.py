"""The best items that users have not rated, by original ids, from a trained or a quantized model."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import Split, load_split
from distiller.cli import ArgumentParser, InputError, run
from recording import show_messages
from saved import load_saved
from scoring import Scorer, check_finite_scores
from titles import TITLES, read_titles

PROG = "recommend.py"
PAIRS_AT_ONCE = 1 << 20  # whose scores are held at a time: 4 MB
FORMATS = ("table", "csv", "json")


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


def as_rows(found: list[Recommendation], with_titles: bool) -> list[dict[str, object]]:
    """What is printed of each, by column."""
    columns = ["user", "rank", "item", "score", *(["title"] if with_titles else [])]
    return [{name: getattr(x, name) for name in columns} for x in found]


def print_table(rows: list[dict[str, object]]) -> None:
    """Columns in line, numbers to the right."""
    cells = [
        [("" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x)) for x in row.values()]
        for row in rows
    ]
    cells.insert(0, list(rows[0]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line[:4], widths, strict=False)]
        print("  ".join([*padded, *line[4:]]).rstrip())


def print_rows(rows: list[dict[str, object]], form: str) -> None:
    """To stdout, in one of ``FORMATS``."""
    if form == "json":
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(rows)


def titles_of(args: Namespace) -> dict[int, str]:
    """From ``--movies``, or else those that the split keeps, if any."""
    if args.movies:
        return read_titles(args.movies)
    kept = args.data / TITLES
    return read_titles(kept) if kept.is_file() else {}


def parse_args() -> Namespace:
    parser = ArgumentParser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="best.pth.tar or quantized.pth.tar")
    add("data", type=Path, help="directory of the split that it was trained on")
    add("--user", type=int, nargs="+", required=True, metavar="ID", help="users, by their ids in the ratings")
    add("-n", type=int, default=10, metavar="N", help="items for each (default: %(default)s)")
    add(
        "--movies",
        type=Path,
        metavar="FILE",
        help="titles: movies.csv, movies.dat or u.item (default: the split's)",
    )
    add("--format", choices=FORMATS, default="table", help="(default: %(default)s)")
    args = parser.parse_args()
    if args.n < 1:
        raise InputError(f"-n must be at least 1, not {args.n}")
    return args


def main() -> None:
    args = parse_args()
    show_messages(PROG)
    split = load_split(args.data)
    ids = list(dict.fromkeys(args.user))
    numbers = numbers_of_users(split, ids, args.data)
    titles = titles_of(args)
    saved = load_saved(args.checkpoint)
    saved.check_sizes(split, args.checkpoint, args.data)
    found = recommend(saved.scorer(), split, ids, numbers, args.n, titles)
    if not found:
        raise InputError(
            f"--user: {' '.join(map(str, ids))}: every item is rated, there is none to recommend"
        )
    print_rows(as_rows(found, bool(titles)), args.format)


if __name__ == "__main__":
    sys.exit(run(PROG, main))
