"""``neural-cf synthetic``: write synthetic ratings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser, InputError
from neural_cf.data.synthetic import (
    MAX_COUNT,
    MAX_SEED,
    MIN_RATINGS_PER_USER,
    MIN_UNRATED_PER_USER,
    write_ratings,
)

PROG = "neural-cf synthetic"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments, checked; the defaults are ml-1m's counts."""
    parser = ArgumentParser(PROG, description="Write synthetic ratings in the format of ml-20m.")
    parser.add_argument("out", metavar="OUT", help="CSV file to write, in place of what is there")
    parser.add_argument("--users", type=int, default=6040, metavar="N", help="number of users (%(default)s)")
    parser.add_argument(
        "--items", type=int, default=3706, metavar="N", help="items, all of them rated (%(default)s)"
    )
    parser.add_argument("--ratings", type=int, default=1_000_209, metavar="N", help="rows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same file (%(default)s)")
    arguments = parser.parse_args(argv)
    check_counts(arguments.users, arguments.items, arguments.ratings)
    check_between("--seed", arguments.seed, 0, MAX_SEED)
    return arguments


def check_counts(num_users: int, num_items: int, num_ratings: int) -> None:
    """Raise an ``InputError`` unless every user can have the minimum and every item a rating."""
    check_between("--users", num_users, 2, MAX_COUNT)
    check_between("--items", num_items, MIN_RATINGS_PER_USER + MIN_UNRATED_PER_USER, MAX_COUNT)
    fewest = max(MIN_RATINGS_PER_USER * num_users, num_items)
    most = num_users * (num_items - MIN_UNRATED_PER_USER)
    reason = f" for {num_users} users and {num_items} items"
    check_between("--ratings", num_ratings, fewest, most, reason)


def check_between(flag: str, value: int, low: int, high: int, reason: str = "") -> None:
    """Raise an ``InputError`` unless low <= value <= high."""
    if not low <= value <= high:
        raise InputError(f"{flag} {value}: must be from {low} to {high}{reason}")


def check_output(path: Path) -> None:
    """Raise an ``InputError`` unless a file can stand at ``path``: not a directory, nor a device to be replaced."""
    if not path.parent.is_dir():
        raise InputError(f"OUT {path}: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        raise InputError(f"OUT {path}: is not a regular file")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, by default the process's own."""
    arguments = parse_args(argv)
    path = Path(os.path.realpath(arguments.out))  # a link stays, and what it points to is replaced
    check_output(path)
    write_ratings(path, arguments.users, arguments.items, arguments.ratings, arguments.seed)
