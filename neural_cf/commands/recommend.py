"""``neural-cf recommend``: print the best items for users."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser, InputError
from neural_cf.data.titles import TITLES, read_titles
from neural_cf.int8.scorer import scorer_of
from neural_cf.runs.log import show_messages
from neural_cf.runs.models import read_model
from neural_cf.serving.recommend import (
    Recommendation,
    numbers_of_users,
    recommend,
)
from neural_cf.split import load_split

PROG = "neural-cf recommend"
FORMATS = ("table", "csv", "json")


def as_rows(found: list[Recommendation], with_titles: bool) -> list[dict[str, object]]:
    """Return what is printed of each recommendation, by column."""
    columns = ["user", "rank", "item", "score", *(["title"] if with_titles else [])]
    return [{name: getattr(x, name) for name in columns} for x in found]


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows as a table with aligned columns."""
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
    """Print rows in one of ``FORMATS``."""
    if form == "json":
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(rows)


def titles_of(args: Namespace) -> dict[int, str]:
    """Return the titles of ``--movies``, or else those that the split keeps, by original item id."""
    if args.movies:
        return read_titles(args.movies)
    kept = args.data / TITLES
    return read_titles(kept) if kept.is_file() else {}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Return the command line's arguments.

    Raises:
        InputError: one of them is out of its range.
    """
    parser = ArgumentParser(
        prog=PROG,
        description="Print the items that a model scores best among those that users have not rated.",
    )
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
    args = parser.parse_args(argv)
    if args.n < 1:
        raise InputError(f"-n must be at least 1, not {args.n}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    args = parse_args(argv)
    show_messages(PROG)
    split = load_split(args.data)
    ids = list(dict.fromkeys(args.user))
    numbers = numbers_of_users(split, ids, args.data)
    titles = titles_of(args)
    saved = read_model(args.checkpoint)
    saved.check_sizes(split, args.checkpoint, args.data)
    found = recommend(scorer_of(saved), split, ids, numbers, args.n, titles)
    if not found:
        raise InputError(
            f"--user: {' '.join(map(str, ids))}: every item is rated, there is none to recommend"
        )
    print_rows(as_rows(found, bool(titles)), args.format)
