"""A split small enough to be looked through by hand."""

from __future__ import annotations

import numpy as np

from neural_cf.split import Split


def tiny_split() -> Split:
    """Three users, six items."""
    return Split(
        nb_users=3,
        nb_items=6,
        train_users=np.array([0, 0, 1, 2, 2, 2], dtype=np.uint8),
        train_items=np.array([0, 1, 5, 1, 2, 3], dtype=np.uint8),
        test_items=np.array([4, 3, 5], dtype=np.uint8),
        negatives=np.array([[2, 3], [0, 0], [4, 0]], dtype=np.uint8),
        distinct_negatives=False,
        seed=7,
        digest="sha256:" + "0" * 64,
        user_ids=np.array([10, 30, 20]),
        item_ids=np.array([5, 4, 3, 2, 1, 9]),
    )
