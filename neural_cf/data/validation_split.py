"""``--validate``: epochs chosen by the item before the last, which training then leaves out.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from distiller.system.cli import InputError
from neural_cf.data.negatives import UnseenItems, draw_negatives, keep
from neural_cf.split import Split

STREAM = 1  # beside a split's seed: negatives of validation are others than those of the test


def validation_split(split: Split, path: Path) -> Split:
    """The split as it would be without every user's last item, which stays unseen.

    Its test items are the items before the last, training pairs are the others, and negatives are drawn by the split's
    own rule: as many, likewise with or without replacement, uniform over what training leaves unseen.

    Args:
        split: As converted.
        path: Its directory, for messages.

    Raises:
        InputError: it does not say which item is the one before the last, or that one is not in training or all of it.
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
    if split.distinct_negatives:  # and so without the item that they are to be ranked with
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
