"""Ratings file to split: the last item of every user held out, negatives drawn to rank it against.

Reads MovieLens ml-100k, ml-1m, ml-10m, ml-20m, ml-25m and ml-32m, told apart by content.

Shapes: R ratings, U users, I items, C negatives per user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from distiller.system.files import atomic_write, file_digest
from neural_cf.data.negatives import UnseenItems, check_unrated, draw_negatives, keep
from neural_cf.data.ratings import (
    last_rows,
    read_ratings,
)
from neural_cf.data.titles import TITLES, movies_beside, read_titles, write_titles
from neural_cf.split import CSV_FILES, NEGATIVE, PICKLE, TEST, TRAIN, Split, building, id_dtype, write_pickle

PAIRS_PER_BLOCK = 1 << 20  # 14 MB of text at ml-20m's ids


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
