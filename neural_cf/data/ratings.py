"""Reading of ratings files, and numbering of their users and items.

Shapes: R ratings, U users, I items.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from distiller.system.cli import InputError
from distiller.system.naming import errors_named
from distiller.system.tables import read_columns

CSV_HEADER = "userId,movieId,rating,timestamp"
COLUMNS = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
MIN_RATINGS = 20  # per user, as in MovieLens; the original implementation drops users with fewer, too


@dataclass(frozen=True)
class Ratings:
    """The ratings of a file in its order, with users and items numbered by first appearance.

    Attributes:
        users: (R,) int64 numbers of the users, in [0, U).
        items: (R,) int64 numbers of the items, in [0, I).
        times: (R,) int64 timestamps in seconds.
        user_ids: (U,) int64, the users' ids in the file.
        item_ids: (I,) int64, the items' ids in the file.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray


def sniff_format(path: Path) -> tuple[str, bool]:
    """Return a ratings file's delimiter and whether it has a header, from its first line.

    Raises:
        InputError: the first line is in none of MovieLens's formats.
        OSError: the file cannot be read; the error's ``filename`` is ``path``.
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
    """Read the ratings of the users who have at least ``MIN_RATINGS``, and number users and items.

    If a user has rated an item more than once, only the latest rating counts.

    Raises:
        InputError: a line is malformed (the message names file and line), or fewer than 2 users or items are left.
        OSError: the file cannot be read; the error's ``filename`` is ``path``.
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
    """Return (R,) bool: which ratings' users have rated the same item again later, by time and then by line."""
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
    """Return the (U,) rows of each user's last rating by time; of ratings at the same time the last row counts."""
    latest = np.full(nb_users, np.iinfo(np.int64).min)
    np.maximum.at(latest, users, times)
    rows = np.flatnonzero(times == latest[users])
    last = np.full(nb_users, -1)
    np.maximum.at(last, users[rows], rows)
    return last
