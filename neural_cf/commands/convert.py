"""``neural-cf convert RATINGS OUT``, which is also ``convert.py``: turn a ratings file into a split."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from distiller.system.cli import ArgumentParser
from neural_cf.data.conversion import (
    convert,
)

DESCRIPTION = (
    "Turn a ratings file into a split: each user's last item is held out, with negatives to rank it against."
)
MAX_NEGATIVES = 100_000  # above any data set's items; a block of users then takes 1.6 GB


def parse_args(argv: Sequence[str] | None, prog: str) -> Namespace:
    """Return the command line's arguments, or end the program where one of them is out of its range."""
    parser = ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("ratings", type=Path, help="ratings.csv, ratings.dat or u.data")
    parser.add_argument("out", type=Path, help="directory for the split")
    parser.add_argument(
        "-n",
        "--negatives",
        type=int,
        default=999,
        metavar="N",
        help="negatives per user (default: %(default)s)",
    )
    parser.add_argument("-s", "--seed", type=int, default=0, help="of the negatives (default: %(default)s)")
    parser.add_argument(
        "--distinct-negatives",
        action="store_true",
        help="draw negatives without replacement and without the test item; the published figures have both",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.negatives <= MAX_NEGATIVES:
        parser.error(f"-n/--negatives must be from 1 to {MAX_NEGATIVES}, not {args.negatives}")
    if not 0 <= args.seed < 1 << 32:
        parser.error(f"-s/--seed must be in 0 .. 2^32 - 1, not {args.seed}")
    return args


def main(argv: Sequence[str] | None = None, prog: str = "neural-cf convert") -> None:
    """Run the command line ``argv``, by default the process's own; errors and help name ``prog``."""
    args = parse_args(argv, prog)
    split = convert(args.ratings, args.out, args.negatives, args.seed, args.distinct_negatives)
    print(
        f"{args.out}: {split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs, "
        f"{args.negatives} negatives per user"
    )
