"""The split for ``--validate``: the best epoch is chosen by every user's item before the last.

Training then leaves that item out.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from distiller.system.cli import InputError
from neural_cf.data.negatives import UnseenItems, draw_negatives, keep
from neural_cf.split import Split

STREAM = 1  # goes with the split's seed, so that validation has other negatives than the test


def validation_split(split: Split, path: Path) -> Split:
    """Return the split that ``split`` would be without every user's last item, which stays unseen.

    Its test items are the items before the last, and its training pairs are the others. Negatives are drawn by the rule
    of ``split``: equally many, equally with or without replacement, and uniformly from the items unseen in training.

    Args:
        split: The split as converted from ratings.
        path: The split's directory, for messages.

    Raises:
        InputError: the split does not say which item comes before the last, or a user's item before the last is not in
            training, or is all that the user has there.
    """
    if split.validation_items is None or split.seed is None:
        raise InputError(
            f"--validate: {path} does not say which item comes before the last one: convert its ratings again"
        )
    users, items, held_out = split.train_users, split.train_items, split.validation_items
    kept = items != held_out[users]
    left = np.bincount(users[kept], minlength=split.nb_users)
    bad = np.flatnonzero((left == 0) | (left == np.bincount(users, minlength=split.nb_users)))
    if bad.size:
        raise InputError(
            f"--validate: {path}: of user {bad[0]}, training without item {held_out[bad[0]]} has {left[bad[0]]} items"
        )
    users, items = users[kept], items[kept]
    negatives = np.empty_like(split.negatives)
    if split.distinct_negatives:  # then also without the item that they are ranked against
        seen = UnseenItems(split.train_users, split.train_items, split.nb_users, split.nb_items)
    else:
        seen = UnseenItems(users, items, split.nb_users, split.nb_items)
    drawn = draw_negatives(
        seen, split.nb_candidates - 1, [split.seed, STREAM], bool(split.distinct_negatives)
    )
    for _ in keep(drawn, negatives):
        pass
    return replace(
        split,
        train_users=users,
        train_items=items,
        test_items=held_out,
        negatives=negatives,
        validation_items=None,
    )
