"""Ratings file to split: the last item of every user held out, negatives drawn to rank it against.

Reads MovieLens ml-100k, ml-1m, ml-10m, ml-20m, ml-25m and ml-32m, told apart by content.

Shapes: R ratings, U users, I items, C negatives per user.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from tqdm import tqdm

from dataset import CSV_FILES, NEGATIVE, PICKLE, TEST, TRAIN, Split, building, id_dtype, write_pickle
from distiller.cli import ArgumentParser, InputError, run
from distiller.files import atomic_write, file_digest
from distiller.naming import errors_named
from distiller.tables import read_columns
from sampling import UnseenItems
from titles import TITLES, movies_beside, read_titles, write_titles

CSV_HEADER = "userId,movieId,rating,timestamp"
COLUMNS = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
MIN_RATINGS = 20  # MovieLens keeps users with at least 20 ratings; the original drops the others too
MAX_NEGATIVES = 100_000  # above any data set's items; a block of users then takes 1.6 GB
USERS_PER_BLOCK = 2048  # 2 M negatives at 999 each: 16 MB as int64
PAIRS_PER_BLOCK = 1 << 20  # 14 MB of text at ml-20m's ids


@dataclass(frozen=True)
class Ratings:
    """Ratings in file order, users and items numbered by first appearance.

    Attributes:
        users: (R,) int64 in [0, U).
        items: (R,) int64 in [0, I).
        times: (R,) int64, seconds.
        user_ids: (U,) int64, the file's ids.
        item_ids: (I,) int64, the file's ids.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray


def sniff_format(path: Path) -> tuple[str, bool]:
    """The file's delimiter and whether it has a header.

    Raises:
        InputError: the first line is none of MovieLens's.
    """
    with errors_named(path), open(path, "rb") as file:
        first = file.readline(1024).decode(errors="replace").rstrip("\r\n")
    if first == CSV_HEADER:
        return ",", True
    for delimiter in ("::", "\t"):
        if re.match(rf"-?\w+{delimiter}", first):
            return delimiter, False
    raise InputError(
        f"{path}:1: neither the header {CSV_HEADER} nor fields between '::' or tabs: {first[:60]!r}"
    )


def read_ratings(path: Path) -> Ratings:
    """Read and number the ratings of the users who have at least ``MIN_RATINGS``.

    Where a user has rated an item more than once, the latest rating alone counts.

    Raises:
        InputError: naming file and line for malformed input; or fewer than 2 users or items are left.
    """
    delimiter, header = sniff_format(path)
    table = read_columns(path, delimiter, COLUMNS, header, unsigned={"user", "item"})
    users, items, times = (table[name].to_numpy() for name in ("user", "item", "timestamp"))
    del table
    kept = ~repeated(users, items, times)
    if not kept.all():
        print(f"{path}: {np.sum(~kept)} ratings left out, whose users rated the item again later")
    codes, user_ids = pd.factorize(users[kept])
    active = np.bincount(codes, minlength=len(user_ids)) >= MIN_RATINGS
    kept[kept] = active[codes]
    users, user_ids = pd.factorize(users[kept])
    items, item_ids = pd.factorize(items[kept])
    if len(user_ids) < 2 or len(item_ids) < 2:
        raise InputError(
            f"{path}: {len(user_ids)} users and {len(item_ids)} items are left without the users who have "
            f"fewer than {MIN_RATINGS} ratings; a split needs 2 of each"
        )
    return Ratings(users, items, times[kept], user_ids, item_ids)


def repeated(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(R,) bool: the ratings whose user rated the same item again later (by time, then by line)."""
    user_codes, _ = pd.factorize(users)
    item_codes, item_ids = pd.factorize(items)
    pairs = user_codes * len(item_ids) + item_codes
    result = np.zeros(len(pairs), dtype=bool)
    if not np.any(np.diff(np.sort(pairs)) == 0):
        return result
    order = np.argsort(times, kind="stable")
    result[order] = pd.Series(pairs[order]).duplicated(keep="last")
    return result


def last_rows(users: np.ndarray, times: np.ndarray, nb_users: int) -> np.ndarray:
    """(U,) the row of each user's last rating by time, the later row where times tie."""
    latest = np.full(nb_users, np.iinfo(np.int64).min)
    np.maximum.at(latest, users, times)
    rows = np.flatnonzero(times == latest[users])
    last = np.full(nb_users, -1)
    np.maximum.at(last, users[rows], rows)
    return last


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


def digits(count: int, ending: str) -> np.ndarray:
    """(``count``,) bytes: the decimal text of 0, 1, ... each followed by ``ending``.

    Text of many ids is this array indexed by them, less its padding: eight times as fast as Arrow's CSV writer.
    """
    return np.array([f"{i}{ending}".encode() for i in range(count)])


def as_text(table: np.ndarray) -> bytes:
    """The bytes of an array of byte strings, row after row, without the padding."""
    return table.tobytes().replace(b"\0", b"")


def pair_text(users: np.ndarray, items: np.ndarray, nb_users: int, nb_items: int) -> Iterator[bytes]:
    """Yield lines of user, item, 1 between tabs, a block at a time."""
    user_text, item_text = digits(nb_users, "\t"), digits(nb_items, "\t1\n")
    for start in range(0, len(users), PAIRS_PER_BLOCK):
        block = slice(start, start + PAIRS_PER_BLOCK)
        row = np.dtype([("user", user_text.dtype), ("item", item_text.dtype)])
        lines = np.empty(len(users[block]), dtype=row)
        lines["user"], lines["item"] = user_text[users[block]], item_text[items[block]]
        yield as_text(lines)


def negative_text(blocks: Iterable[np.ndarray], nb_items: int) -> Iterator[bytes]:
    """Yield a line of items between tabs for each row of each block."""
    inner, last = digits(nb_items, "\t"), digits(nb_items, "\n")
    for block in blocks:
        lines = inner[block]
        lines[:, -1] = last[block[:, -1]]
        yield as_text(lines)


def write_blocks(path: Path, blocks: Iterable[bytes]) -> None:
    """Write the blocks to a file, one after the other."""
    with open(path, "wb") as file:
        file.writelines(blocks)


def convert(path: Path, out: Path, nb_negatives: int = 999, seed: int = 0, distinct: bool = False) -> Split:
    """Write the split of the ratings in ``path`` to the directory ``out``: three CSV files and a pickle.

    And the items' titles, where a movies file lies beside the ratings. They get their names when all are written, so
    that a failure leaves what was there before.

    Args:
        path: The ratings file.
        out: The directory, made where it is missing.
        nb_negatives: C. 999 as the published ml-20m figures have it.
        seed: Of the draws.
        distinct: Draw negatives without replacement and without the test item.

    Raises:
        InputError: malformed ratings or movies, or a user with too few unrated items to draw from.
    """
    movies = movies_beside(path)
    titles = read_titles(movies) if movies else {}
    ratings = read_ratings(path)
    nb_users, nb_items = len(ratings.user_ids), len(ratings.item_ids)
    test_rows = last_rows(ratings.users, ratings.times, nb_users)
    train_users = np.delete(ratings.users, test_rows).astype(id_dtype(nb_users))
    train_items = np.delete(ratings.items, test_rows).astype(id_dtype(nb_items))
    test_items = ratings.items[test_rows].astype(id_dtype(nb_items))
    # By the same rule, of what is left.
    validation_items = train_items[last_rows(train_users, np.delete(ratings.times, test_rows), nb_users)]
    user_ids, item_ids = ratings.user_ids, ratings.item_ids
    unrated = UnseenItems(ratings.users, ratings.items, nb_users, nb_items)
    del ratings
    check_unrated(path, unrated.counts.numpy(), user_ids, nb_negatives if distinct else 1)
    candidates = unrated if distinct else UnseenItems(train_users, train_items, nb_users, nb_items)
    negatives = np.empty((nb_users, nb_negatives), dtype=id_dtype(nb_items))

    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(building(out))
        # Left in the reverse order, the pickle is renamed first. It is the newest, so that from then on it holds good,
        # also after a kill that leaves some of the CSV files as they were.
        *csv_paths, pickle_path = [
            stack.enter_context(atomic_write(out / name)) for name in (*CSV_FILES, PICKLE)
        ]
        file_of = dict(zip(CSV_FILES, csv_paths, strict=True))
        write_blocks(file_of[TRAIN], pair_text(train_users, train_items, nb_users, nb_items))
        write_blocks(file_of[TEST], pair_text(np.arange(nb_users), test_items, nb_users, nb_items))
        blocks = keep(draw_negatives(candidates, nb_negatives, seed, distinct), negatives)
        write_blocks(file_of[NEGATIVE], negative_text(blocks, nb_items))
        split = Split(
            nb_users=nb_users,
            nb_items=nb_items,
            train_users=train_users,
            train_items=train_items,
            test_items=test_items,
            negatives=negatives,
            distinct_negatives=distinct,
            seed=seed,
            digest=file_digest(path),
            user_ids=user_ids,
            item_ids=item_ids,
            validation_items=validation_items,
        )
        write_pickle(split, pickle_path)
        if titles:
            write_titles(titles, item_ids.tolist(), stack.enter_context(atomic_write(out / TITLES)))
    if not titles:
        (out / TITLES).unlink(missing_ok=True)  # of other ratings
    return split


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


def parse_args() -> Namespace:
    parser = ArgumentParser(prog="convert.py", description=__doc__.split("\n\n")[0])
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
    args = parser.parse_args()
    if not 1 <= args.negatives <= MAX_NEGATIVES:
        parser.error(f"-n/--negatives must be from 1 to {MAX_NEGATIVES}, not {args.negatives}")
    if not 0 <= args.seed < 1 << 32:
        parser.error(f"-s/--seed must be in 0 .. 2^32 - 1, not {args.seed}")
    return args


def main() -> None:
    args = parse_args()
    split = convert(args.ratings, args.out, args.negatives, args.seed, args.distinct_negatives)
    print(
        f"{args.out}: {split.nb_users} users, {split.nb_items} items, {len(split.train_users)} training pairs, "
        f"{args.negatives} negatives per user"
    )


if __name__ == "__main__":
    sys.exit(run("convert.py", main, "a smaller -n/--negatives takes less"))
