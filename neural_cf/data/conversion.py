"""Conversion of a ratings file to a split: every user's last item is held out and negatives are drawn.

It reads MovieLens ml-100k, ml-1m, ml-10m, ml-20m, ml-25m and ml-32m, told apart by content.

Shapes: R ratings, U users, I items, C negatives per user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distiller.system.files import atomic_write, file_digest
from neural_cf.data.negatives import UnseenItems, check_unrated, draw_negatives, keep
from neural_cf.data.ratings import last_rows, read_ratings
from neural_cf.data.titles import TITLES, movies_beside, read_titles, write_titles
from neural_cf.split import CSV_FILES, NEGATIVE, PICKLE, TEST, TRAIN, Split, building, id_dtype, write_pickle

PAIRS_PER_BLOCK = 1 << 20  # 14 MB of text at ml-20m's ids


def digits(count: int, ending: str) -> np.ndarray:
    """Return (``count``,) byte strings: the decimal numbers 0, 1, ..., each followed by ``ending``.

    To write many ids, index this array by them and remove the padding: this is eight times as fast as Arrow's CSV
    writer.
    """
    return np.array([f"{i}{ending}".encode() for i in range(count)])


def as_text(table: np.ndarray) -> bytes:
    """Return the bytes of an array of byte strings, row after row, without the padding."""
    return table.tobytes().replace(b"\0", b"")


def pair_text(users: np.ndarray, items: np.ndarray, nb_users: int, nb_items: int) -> Iterator[bytes]:
    """Yield the lines of a pairs file, "user, tab, item, tab, 1" each, a block at a time."""
    user_text, item_text = digits(nb_users, "\t"), digits(nb_items, "\t1\n")
    for start in range(0, len(users), PAIRS_PER_BLOCK):
        block = slice(start, start + PAIRS_PER_BLOCK)
        row = np.dtype([("user", user_text.dtype), ("item", item_text.dtype)])
        lines = np.empty(len(users[block]), dtype=row)
        lines["user"], lines["item"] = user_text[users[block]], item_text[items[block]]
        yield as_text(lines)


def negative_text(blocks: Iterable[np.ndarray], nb_items: int) -> Iterator[bytes]:
    """Yield the lines of a negatives file, the items of a row with tabs between them, a block at a time."""
    inner, last = digits(nb_items, "\t"), digits(nb_items, "\n")
    for block in blocks:
        lines = inner[block]
        lines[:, -1] = last[block[:, -1]]
        yield as_text(lines)


def write_blocks(path: Path, blocks: Iterable[bytes]) -> None:
    """Write blocks of bytes to a file, one after the other."""
    with open(path, "wb") as file:
        file.writelines(blocks)


class HeldOut(NamedTuple):
    """A file's ratings with the last item of each user held out; users and items are unsigned row numbers.

    Attributes:
        user_ids: (U,) int64, the users' ids in the ratings file.
        item_ids: (I,) int64, the items' ids in the ratings file.
        train_users: (R - U,) the users of the training pairs.
        train_items: (R - U,) the items of the training pairs.
        test_items: (U,) the last item of each user.
        validation_items: (U,) the item before the last of each user, which stays in the training pairs.
        unrated: The items that each user has not rated.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    train_users: np.ndarray
    train_items: np.ndarray
    test_items: np.ndarray
    validation_items: np.ndarray
    unrated: UnseenItems


def hold_out_last(path: Path) -> HeldOut:
    """Read a ratings file and hold out the last item of every user.

    Raises:
        InputError: the ratings are malformed.
        OSError: the file cannot be read; the error's ``filename`` is ``path``.
    """
    ratings = read_ratings(path)
    nb_users, nb_items = len(ratings.user_ids), len(ratings.item_ids)
    test_rows = last_rows(ratings.users, ratings.times, nb_users)
    train_users = np.delete(ratings.users, test_rows).astype(id_dtype(nb_users))
    train_items = np.delete(ratings.items, test_rows).astype(id_dtype(nb_items))
    return HeldOut(
        user_ids=ratings.user_ids,
        item_ids=ratings.item_ids,
        train_users=train_users,
        train_items=train_items,
        test_items=ratings.items[test_rows].astype(id_dtype(nb_items)),
        validation_items=train_items[last_rows(train_users, np.delete(ratings.times, test_rows), nb_users)],
        unrated=UnseenItems(ratings.users, ratings.items, nb_users, nb_items),
    )


def convert(path: Path, out: Path, nb_negatives: int = 999, seed: int = 0, distinct: bool = False) -> Split:
    """Write the split of the ratings in ``path`` to the directory ``out``: three CSV files and a pickle.

    If a movies file lies beside the ratings, the items' titles are written too. The files get their names only when all
    are written, so that a failure leaves in place what was there before.

    Args:
        path: The ratings file.
        out: The directory; it is made if it is missing.
        nb_negatives: C, the number of negatives of each user. The published ml-20m figures are for 999.
        seed: The seed of the negatives.
        distinct: Draw negatives without replacement and without the test item.

    Raises:
        InputError: ratings or movies are malformed, or a user has too few unrated items to draw negatives from.
        OSError: a file cannot be read or written; the error's ``filename`` names it.
    """
    movies = movies_beside(path)
    titles = read_titles(movies) if movies else {}
    held_out = hold_out_last(path)
    nb_users, nb_items = len(held_out.user_ids), len(held_out.item_ids)
    train_users, train_items, test_items = held_out.train_users, held_out.train_items, held_out.test_items
    unrated = held_out.unrated
    check_unrated(path, unrated.counts.numpy(), held_out.user_ids, nb_negatives if distinct else 1)
    candidates = unrated if distinct else UnseenItems(train_users, train_items, nb_users, nb_items)
    negatives = np.empty((nb_users, nb_negatives), dtype=id_dtype(nb_items))

    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(building(out))
        # The stack is left in reverse order, so that the pickle is renamed first. As the newest file, it is valid from
        # then on, even if a kill leaves some of the CSV files as they were before.
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
            user_ids=held_out.user_ids,
            item_ids=held_out.item_ids,
            validation_items=held_out.validation_items,
        )
        write_pickle(split, pickle_path)
        if titles:
            write_titles(titles, held_out.item_ids.tolist(), stack.enter_context(atomic_write(out / TITLES)))
    if not titles:
        (out / TITLES).unlink(missing_ok=True)  # those of the ratings converted before
    return split
